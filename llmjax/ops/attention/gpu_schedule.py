"""The GPU kernels' schedule: which blocks a program computes, and how it reads and writes them (`pallas_gpu`)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmjax.ops import chunks
from llmjax.ops.attention.mask import Mask, Span, block_spans, pad_spans, stack_coords
from llmjax.ops.attention.pairs import Rows, list_rows

# The smallest number of rows and columns that Triton accepts in a product of tiles.
MIN_TILE = 16
# The most entries in the block lists of one call, to bound their memory (16 MiB of int32). More are split into
# several calls.
MAX_LISTED_BLOCKS = 2**22
# exp(x) = 2 ** (x * log2(e)).
LOG2_E = math.log2(math.e)

Arrays = tuple[jax.Array, ...]


class Tile(NamedTuple):
    """The shape of the work of one program.

    resident  tokens of the block that the program holds
    streamed  tokens of each block that it goes through
    warps     warps that share the work
    stages    number of streamed blocks that are loaded in advance
    """

    resident: int
    streamed: int
    warps: int
    stages: int


def choose_tile(q: jax.Array, *, backward: bool) -> Tile:
    """Tile sizes that fit the registers and the shared memory of every GPU since Ampere, 99 KiB per thread block.

    The byte limits and the numbers of warps are choices within these bounds.
    """
    size = q.dtype.itemsize
    row = width(q.shape[-1]) * size
    # Two blocks in flight, unless rows are too wide for the shared memory.
    stages = 2 if row <= 1024 else 1

    def tokens(room: int, limit: int) -> int:
        return max(MIN_TILE, min(limit, room // row))

    if backward:
        both = tokens(2**14, 128 // size)
        return Tile(both, both, 4, stages)
    return Tile(tokens(2**15, 128), tokens(2**14, 64), 8 if row == 256 else 4, stages)


class ProgramContext(NamedTuple):
    """What one program works on.

    b      the batch row
    both   the indices of this batch row in the array of keys and values, whose first dimension holds the keys of all
           rows, then the values of all rows
    block  the number of the block that the program holds
    head   the head of the block: a query head, or a key/value head if the program holds keys
    visit  `visit(add, carry)` calls `carry = add(whole, block, i, carry)` for each listed block, where `whole` says
           that no mask is needed, and i counts the query heads of the group (always 0 if the program holds queries)
    """

    b: jax.Array
    both: tuple[jax.Array, jax.Array]
    block: jax.Array
    head: jax.Array
    visit: Callable[[Callable[..., Any], Any], Any]


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """The pairs of blocks that have to be computed for T queries and S keys, both padded to whole blocks.

    by_keys  programs hold keys and go through queries; otherwise they hold queries and go through keys
    """

    mask: Mask
    T: int
    S: int
    N: int
    K: int
    H: int
    q_size: int
    k_size: int
    by_keys: bool
    tile: Tile
    interpret: bool

    @property
    def G(self) -> int:
        return self.N // self.K

    def run(self, name: str, body: Callable[..., None], inputs: Arrays, sums: Arrays) -> Arrays:
        """Runs a kernel over all blocks and returns `sums` with its results.

        name    the name of the kernel in profiles
        body    the kernel. Its arguments are a `ProgramContext` and references to the coordinates of the queries
                (coords_B2T) and of the keys (coords_B2S), to each input, to each sum before the call, and to each sum
                after it
        inputs  arrays that the kernel reads
        sums    arrays that the kernel adds to
        """
        q_coords = stack_coords(self.mask.q_segments_BT, self.mask.q_positions_BT, self.T)
        k_coords = stack_coords(self.mask.k_segments_BS, self.mask.k_positions_BS, self.S)
        q = block_spans(q_coords[:, 0], q_coords[:, 1], self.q_size)
        k = block_spans(k_coords[:, 0], k_coords[:, 1], self.k_size)
        find = functools.partial(list_rows, self.mask, by_keys=self.by_keys)
        call = functools.partial(self._call, name, body, (q_coords, k_coords, *inputs))
        # Each program holds a major block; minor blocks are listed.
        majors, minors = self.T // self.q_size, self.S // self.k_size
        if self.by_keys:
            majors, minors = minors, majors
        parts = chunks.cut(majors, MAX_LISTED_BLOCKS // (q_coords.shape[0] * minors))
        if parts.count == 1:
            return call(jnp.int32(0), find(q, k), sums)
        q, k = (q, pad_spans(k, parts)) if self.by_keys else (pad_spans(q, parts), k)

        # The lists are too long for one call: each loop step lists and computes a part of the major blocks.
        def go_on(i: jax.Array, sums: Arrays) -> Arrays:
            start = i * parts.size
            cut = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=parts.size, axis=1
            )
            near = (q, Span(*map(cut, k))) if self.by_keys else (Span(*map(cut, q)), k)
            return call(start, find(*near), sums)

        return jax.lax.fori_loop(0, parts.count, go_on, sums)

    def _call(
        self, name: str, body: Callable[..., None], inputs: Arrays, start: jax.Array, rows: Rows, sums: Arrays
    ) -> Arrays:
        # A program that holds keys goes through each listed block once for every query head of the group.
        heads, times = (self.K, self.G) if self.by_keys else (self.N, 1)
        B, majors = rows.counts.shape[:2]

        def program(start, blocks, counts, *refs):
            at, head, b = (pl.program_id(i) for i in range(3))
            # Long lists start first, for balance: with a causal mask these are the first keys, or the last queries.
            row = at if self.by_keys else majors - 1 - at
            masked, needed = counts[b, row, 0], counts[b, row, 1]

            def visit(add, carry):
                def take(whole, step, carry):
                    number, i = jax.lax.div(step, times), jax.lax.rem(step, times)
                    return add(whole, blocks[b, row, number], i, carry)

                carry = jax.lax.fori_loop(0, masked * times, functools.partial(take, False), carry)
                return jax.lax.fori_loop(masked * times, needed * times, functools.partial(take, True), carry)

            @pl.when(needed > 0)
            def _():
                body(ProgramContext(b, (b, B + b), start[0] + row, head, visit), *refs)

        arrays = (start[None], *rows, *inputs)
        return tuple(pl.pallas_call(
            program,
            grid=(majors, heads, B),
            in_specs=[self._spec(x) for x in (*arrays, *sums)],
            out_specs=[self._spec(x) for x in sums],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums],
            # Sums are updated in place, so that blocks without work keep their values.
            input_output_aliases={len(arrays) + i: i for i in range(len(sums))},
            compiler_params=plgpu.CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            interpret=self.interpret,
            name=name,
        )(*arrays, *sums))  # fmt: skip

    def _spec(self, x: jax.Array) -> pl.BlockSpec:
        """The whole array, with heads padded to a power of two, as Triton requires. `load` and `store` mask the
        padding."""
        shape = (*x.shape[:-1], width(self.H)) if x.ndim == 4 else x.shape
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def queries(self, block: jax.Array) -> Any:
        """The tokens of a query block."""
        return pl.ds(block * self.q_size, self.q_size)

    def keys(self, block: jax.Array) -> Any:
        """The tokens of a key block."""
        return pl.ds(block * self.k_size, self.k_size)

    def load(self, ref: Any) -> jax.Array:
        """A block of one head, [tokens, padded H]; the padding reads as zeros."""
        if width(self.H) == self.H:
            return plgpu.load(ref)
        return plgpu.load(ref, mask=self._head_mask(), other=0.0)

    def store(self, ref: Any, x: jax.Array) -> None:
        plgpu.store(ref, x, mask=None if width(self.H) == self.H else self._head_mask())

    def _head_mask(self) -> jax.Array:
        return (jnp.arange(width(self.H)) < self.H)[None]

    def scores(self, x: jax.Array, y: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | None]:
        """Scores of the rows of x with the rows of y, times log2(e), and the derivative of the soft-cap (None without
        one)."""
        products, scale = dot(x, y.T), self.H**-0.5
        if not softcap:
            return products * (scale * LOG2_E), None
        capped = jnp.tanh(products * (scale / softcap))
        return capped * (softcap * LOG2_E), 1.0 - capped * capped


def width(H: int) -> int:
    """H padded to a power of two, and to MIN_TILE at least."""
    return max(MIN_TILE, pl.next_power_of_2(H))


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
