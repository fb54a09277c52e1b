"""Attention kernels for GPUs, written in Pallas for Triton, that compute only blocks with visible keys.

Each program holds one block: queries of one head, or keys and values of one key/value head. It goes through a list of
the blocks of the other kind that its tokens can see, or be seen by. The list is computed from segments, positions,
causality and window while the program runs, so attention over packed documents costs what it would cost for each
document separately. In the list, blocks that need the mask come first, and blocks visible throughout follow. Each
part is a loop without branches, so that the compiler can prefetch. A program whose list is empty reads and writes
nothing. Blocks are read from x_BTNH with strides, without a transposed copy.

The algorithm is FlashAttention 2 (Dao 2023), with block lists as in FlexAttention (Dong et al. 2024). Exponentials
and logarithms are to base 2, which is what the hardware computes.
"""

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
from llmjax.ops.attention import kernel
from llmjax.ops.attention.full import HIDDEN_SCORE
from llmjax.ops.attention.isolation import mark_nonfinite_values, zero_nonfinite
from llmjax.ops.attention.kernel import KernelArray, Softmax
from llmjax.ops.attention.mask import Mask, Span, block_spans, pad_spans
from llmjax.ops.attention.pairs import Rows, list_rows

# The smallest number of rows and columns that Triton accepts in a product of tiles.
MIN_TILE = 16
# The most entries in the block lists of one call, to bound their memory (16 MiB of int32). More are split into
# several calls.
MAX_LISTED_BLOCKS = 2**22
# exp(x) = 2 ** (x * log2(e)).
LOG2_E = math.log2(math.e)

Arrays = tuple[jax.Array, ...]


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
    block: int = 128,
    interpret: bool = False,
) -> jax.Array:
    """out_BTNH, in the dtype of q, equal to `full.attend`, on a GPU.

    block      the most tokens of a block
    interpret  run the kernel in Pallas' interpreter, on any platform, slowly

    Products of float32 operands have the precision that jax is configured for.
    """
    return kernel.attend(PallasGPU(softcap, block, interpret), q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)


@dataclasses.dataclass(frozen=True)
class PallasGPU:
    """The `Kernel` contract on a GPU. Queries keep the layout x_BTNH and keys become kv_2BSKH, padded to whole
    blocks.

    block      the most tokens of a block, a power of two
    interpret  see `attend`
    """

    softcap: float = 0.0
    block: int = 128
    interpret: bool = False

    def cut_queries(self, x_BTNH: jax.Array, K: int) -> KernelArray:
        return jnp.pad(x_BTNH, ((0, 0), (0, -x_BTNH.shape[1] % self._limit(x_BTNH.shape[1])), (0, 0), (0, 0)))

    def join_queries(self, x_BTNH: KernelArray, T: int) -> jax.Array:
        return x_BTNH[:, :T]

    def cut_keys(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> KernelArray:
        S = k_BSKH.shape[1]
        padding = ((0, 0), (0, 0), (0, -S % self._limit(S)), (0, 0), (0, 0))
        return jnp.pad(jnp.stack([k_BSKH, v_BSKH]), padding)

    def join_keys(self, kv_2BSKH: KernelArray, S: int) -> tuple[jax.Array, jax.Array]:
        return kv_2BSKH[0, :, :S], kv_2BSKH[1, :, :S]

    def forward(self, q: KernelArray, kv: KernelArray, mask: Mask, softmax: Softmax) -> Softmax:
        schedule = self._schedule(q, kv, mask, _tile(q, backward=False), by_keys=False)
        body = functools.partial(_forward_body, schedule, self.softcap)
        out, lse = schedule.run("attention", body, (q, _flat(kv)), softmax)
        return out, lse

    def backward(
        self,
        q: KernelArray,
        kv: KernelArray,
        mask: Mask,
        dout: KernelArray,
        lse: KernelArray,
        delta: KernelArray,
        dq: KernelArray | None,
        dkv: KernelArray | None,
    ) -> tuple[KernelArray | None, KernelArray | None]:
        inputs, tile = (q, _flat(kv), dout, lse, delta), _tile(q, backward=True)
        if dq is not None:
            schedule = self._schedule(q, kv, mask, tile, by_keys=False)
            body = functools.partial(_backward_body_of_queries, schedule, self.softcap)
            (dq,) = schedule.run("attention_dq", body, inputs, (dq,))
        if dkv is not None:
            schedule = self._schedule(q, kv, mask, tile, by_keys=True)
            body = functools.partial(_backward_body_of_keys, schedule, self.softcap)
            dkv = schedule.run("attention_dkv", body, inputs, (_flat(dkv),))[0].reshape(dkv.shape)
        return dq, dkv

    def _limit(self, tokens: int) -> int:
        """The largest block size for this number of tokens. All smaller block sizes divide it."""
        return min(self.block, max(MIN_TILE, pl.next_power_of_2(tokens)))

    def _schedule(
        self, q: KernelArray, kv: KernelArray, mask: Mask, tile: Tile, *, by_keys: bool
    ) -> BlockSchedule:
        (_, T, N, H), (S, K) = q.shape, kv.shape[2:4]
        sizes = (tile.streamed, tile.resident) if by_keys else (tile.resident, tile.streamed)
        q_size, k_size = (min(size, self._limit(tokens)) for size, tokens in zip(sizes, (T, S)))
        return BlockSchedule(mask, T, S, N, K, H, q_size, k_size, by_keys, tile, self.interpret)


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


def _tile(q: jax.Array, *, backward: bool) -> Tile:
    """Tile sizes that fit the registers and the shared memory of every GPU since Ampere, 99 KiB per thread block.

    The byte limits and the numbers of warps are choices within these bounds.
    """
    size = q.dtype.itemsize
    row = _width(q.shape[-1]) * size
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
        q_coords = _coords(self.mask.q_segments_BT, self.mask.q_positions_BT, self.T)
        k_coords = _coords(self.mask.k_segments_BS, self.mask.k_positions_BS, self.S)
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
        shape = (*x.shape[:-1], _width(self.H)) if x.ndim == 4 else x.shape
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def queries(self, block: jax.Array) -> Any:
        """The tokens of a query block."""
        return pl.ds(block * self.q_size, self.q_size)

    def keys(self, block: jax.Array) -> Any:
        """The tokens of a key block."""
        return pl.ds(block * self.k_size, self.k_size)

    def load(self, ref: Any) -> jax.Array:
        """A block of one head, [tokens, padded H]; the padding reads as zeros."""
        if _width(self.H) == self.H:
            return plgpu.load(ref)
        return plgpu.load(ref, mask=self._head_mask(), other=0.0)

    def store(self, ref: Any, x: jax.Array) -> None:
        plgpu.store(ref, x, mask=None if _width(self.H) == self.H else self._head_mask())

    def _head_mask(self) -> jax.Array:
        return (jnp.arange(_width(self.H)) < self.H)[None]

    def scores(self, x: jax.Array, y: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | None]:
        """Scores of the rows of x with the rows of y, times log2(e), and the derivative of the soft-cap (None without
        one)."""
        products, scale = _dot(x, y.T), self.H**-0.5
        if not softcap:
            return products * (scale * LOG2_E), None
        capped = jnp.tanh(products * (scale / softcap))
        return capped * (softcap * LOG2_E), 1.0 - capped * capped


def _flat(kv_2BSKH: KernelArray) -> jax.Array:
    """[2, B, S, K, H] -> [2 B, S, K, H], the four dimensions that `load` and `store` work with."""
    return kv_2BSKH.reshape(-1, *kv_2BSKH.shape[2:])


def _width(H: int) -> int:
    """H padded to a power of two, and to MIN_TILE at least."""
    return max(MIN_TILE, pl.next_power_of_2(H))


def _coords(segments_BX: jax.Array, positions_BX: jax.Array, tokens: int) -> jax.Array:
    """Segments and positions [B, 2, tokens], filled with padding."""
    coords_B2X = jnp.stack([segments_BX, positions_BX], axis=1)
    return jnp.pad(coords_B2X, ((0, 0), (0, 0), (0, tokens - segments_BX.shape[1])))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _forward_body(
    schedule: BlockSchedule,
    softcap: float,
    at: ProgramContext,
    q_coords,
    k_coords,
    q,
    kv,
    out_before,
    lse_before,
    out,
    lse,
):
    rows, kv_head = schedule.queries(at.block), jax.lax.div(at.head, schedule.G)
    q_block = schedule.load(q.at[at.b, rows, at.head])
    q_coord = q_coords[at.b, 0, rows][:, None], q_coords[at.b, 1, rows][:, None]

    def add(whole, block, _, carry):
        acc, largest, total = carry
        keys = schedule.keys(block)
        k_block, v_block = (schedule.load(kv.at[b, keys, kv_head]) for b in at.both)
        if not whole:
            k_block, v_block = mark_nonfinite_values(k_block, v_block)
        scores, _ = schedule.scores(q_block, k_block, softcap)
        if not whole:
            k_coord = k_coords[at.b, 0, keys][None], k_coords[at.b, 1, keys][None]
            scores = jnp.where(schedule.mask.visible(*q_coord, *k_coord), scores, HIDDEN_SCORE)
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
        acc = acc * shrink[:, None] + _dot(weights.astype(v_block.dtype), v_block)
        return acc, new, total * shrink + jnp.sum(weights, axis=1)

    largest = lse_before[at.b, rows, at.head] * LOG2_E
    acc = schedule.load(out_before.at[at.b, rows, at.head]).astype(jnp.float32)
    acc, largest, total = at.visit(add, (acc, largest, jnp.ones_like(largest)))
    schedule.store(out.at[at.b, rows, at.head], (acc / total[:, None]).astype(out.dtype))
    lse[at.b, rows, at.head] = (largest + jnp.log2(total)) / LOG2_E


def _backward_body_of_queries(
    schedule: BlockSchedule,
    softcap: float,
    at: ProgramContext,
    q_coords,
    k_coords,
    q,
    kv,
    dout,
    lse,
    delta,
    dq_before,
    dq,
):
    rows, kv_head = schedule.queries(at.block), jax.lax.div(at.head, schedule.G)
    q_block, dout_block = (schedule.load(x.at[at.b, rows, at.head]) for x in (q, dout))
    q_coord = q_coords[at.b, 0, rows][:, None], q_coords[at.b, 1, rows][:, None]
    lse_column = (lse[at.b, rows, at.head] * LOG2_E)[:, None]
    delta_column = delta[at.b, rows, at.head][:, None]

    def add(whole, block, _, acc):
        keys = schedule.keys(block)
        k_block, v_block = (schedule.load(kv.at[b, keys, kv_head]) for b in at.both)
        scores, slope = schedule.scores(q_block, k_block, softcap)
        weights = jnp.exp2(scores - lse_column)
        dscores = weights * (_dot(dout_block, v_block.T) - delta_column)
        if slope is not None:
            dscores *= slope
        if not whole:
            k_coord = k_coords[at.b, 0, keys][None], k_coords[at.b, 1, keys][None]
            dscores = jnp.where(schedule.mask.visible(*q_coord, *k_coord), dscores, 0.0)
            k_block = zero_nonfinite(k_block)
        return acc + _dot(dscores.astype(k_block.dtype), k_block)

    acc = at.visit(add, jnp.zeros(q_block.shape, jnp.float32))
    before = schedule.load(dq_before.at[at.b, rows, at.head]).astype(jnp.float32)
    schedule.store(dq.at[at.b, rows, at.head], (before + acc * schedule.H**-0.5).astype(dq.dtype))


def _backward_body_of_keys(
    schedule: BlockSchedule,
    softcap: float,
    at: ProgramContext,
    q_coords,
    k_coords,
    q,
    kv,
    dout,
    lse,
    delta,
    dkv_before,
    dkv,
):
    keys = schedule.keys(at.block)
    k_block, v_block = (schedule.load(kv.at[b, keys, at.head]) for b in at.both)
    k_coord = k_coords[at.b, 0, keys][:, None], k_coords[at.b, 1, keys][:, None]

    def add(whole, block, i, carry):
        dk, dv = carry
        rows, head = schedule.queries(block), at.head * schedule.G + i
        q_block, dout_block = (schedule.load(x.at[at.b, rows, head]) for x in (q, dout))
        scores, slope = schedule.scores(k_block, q_block, softcap)
        weights = jnp.exp2(scores - (lse[at.b, rows, head] * LOG2_E)[None])
        dscores = weights * (_dot(v_block, dout_block.T) - delta[at.b, rows, head][None])
        if slope is not None:
            dscores *= slope
        if not whole:
            q_coord = q_coords[at.b, 0, rows][None], q_coords[at.b, 1, rows][None]
            visible = schedule.mask.visible(*q_coord, *k_coord)
            weights, dscores = jnp.where(visible, weights, 0.0), jnp.where(visible, dscores, 0.0)
            q_block, dout_block = zero_nonfinite(q_block), zero_nonfinite(dout_block)
        dv += _dot(weights.astype(dout_block.dtype), dout_block)
        return dk + _dot(dscores.astype(q_block.dtype), q_block), dv

    zeros = jnp.zeros(k_block.shape, jnp.float32)
    dk, dv = at.visit(add, (zeros, zeros))
    for b, more in zip(at.both, (dk * schedule.H**-0.5, dv)):
        before = schedule.load(dkv_before.at[b, keys, at.head]).astype(jnp.float32)
        schedule.store(dkv.at[b, keys, at.head], (before + more).astype(dkv.dtype))
