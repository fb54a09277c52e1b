"""The TPU kernels' schedule: the list of block pairs, and the block of each array that a pair needs (`pallas_tpu`)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.ops import chunks
from llmjax.ops.attention.mask import Mask, Span, block_spans, pad_spans, stack_coords
from llmjax.ops.attention.pairs import Pairs, list_pairs

# The width of a TPU vector register.
LANES = 128
# The most pairs in one list: its two int32 arrays lie in scalar memory, which has 1 MiB.
MAX_PAIRS = 2**15
Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """The pairs of blocks that have to be computed for T queries and S keys, both padded to whole blocks.

    by_keys  the list goes key block by key block; otherwise query block by query block
    """

    mask: Mask
    T: int
    S: int
    G: int
    q_size: int
    k_size: int
    by_keys: bool
    interpret: bool

    @property
    def rows(self) -> int:
        """The rows of a query block: its queries, counted for every query head of a group."""
        return self.G * self.q_size

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of query blocks and key blocks in a batch row."""
        return self.T // self.q_size, self.S // self.k_size

    def run(
        self, body: Callable[..., None], inputs: dict[str, Arrays], sums: dict[str, jax.Array],
        scratch: Sequence[tuple[int, ...]],
    ) -> Arrays:  # fmt: skip
        """Runs a kernel over all pairs, batch rows and key/value heads, and returns `sums` with its results.

        body     the kernel. Its arguments are the flags of the pair and references: to the coordinates of the query
                 block and of the key block, to the block of each input, of each sum before the call and of each sum
                 after it, and to scratch memory. The first scratch array is for the coordinates of the resident block
                 along the sublanes
        inputs   arrays that the kernel reads, by their kind: `queries` (q_BKGTH), `rows` (lse_BKGT), `keys`
                 (kv_2BKSH)
        sums     arrays that the kernel adds to, by their kind
        scratch  the shapes of further float32 scratch arrays
        """
        q_coords = stack_coords(self.mask.q_segments_BT, self.mask.q_positions_BT, self.T)
        k_coords = stack_coords(self.mask.k_segments_BS, self.mask.k_positions_BS, self.S)
        q = block_spans(q_coords[:, 0], q_coords[:, 1], self.q_size)
        k = block_spans(k_coords[:, 0], k_coords[:, 1], self.k_size)
        inputs = {"q_coords": (q_coords,), "k_coords": (k_coords,), **inputs}
        find = functools.partial(list_pairs, self.mask, counts=self.counts, by_keys=self.by_keys)
        call = functools.partial(self._call, body, inputs, tuple(sums), scratch)
        B, (nq, nk) = q_coords.shape[0], self.counts
        if B * nq * nk <= MAX_PAIRS:
            return call(find(q, k), tuple(sums.values()))
        # One list would be too long for the scalar memory: a loop lists and computes a part of the pairs at a time, a
        # rectangle of query blocks and key blocks of one batch row.
        of_q, of_k = (chunks.cut(n, math.isqrt(MAX_PAIRS)) for n in (nq, nk))
        q, k = pad_spans(q, of_q), pad_spans(k, of_k)
        groups = B, of_q.count, of_k.count

        # The loop index counts (batch row, group of query blocks, group of key blocks).
        def part(i: jax.Array, sums: Arrays) -> Arrays:
            b, i, j = i // (groups[1] * groups[2]), i // groups[2] % groups[1], i % groups[2]
            i, j = i * of_q.size, j * of_k.size
            near_q = Span(*(jax.lax.dynamic_slice(x, (b, i), (1, of_q.size)) for x in q))
            near_k = Span(*(jax.lax.dynamic_slice(x, (b, j), (1, of_k.size)) for x in k))
            return call(find(near_q, near_k, start=(b, i, j)), sums)

        return jax.lax.fori_loop(0, math.prod(groups), part, tuple(sums.values()))

    def _call(
        self, body: Callable[..., None], inputs: dict[str, Arrays], kinds: tuple[str, ...],
        scratch: Sequence[tuple[int, ...]], pairs: Pairs, sums: Arrays,
    ) -> Arrays:  # fmt: skip
        specs = [self._spec(kind, x.shape) for kind, arrays in inputs.items() for x in arrays]
        sum_specs = [self._spec(kind, x.shape) for kind, x in zip(kinds, sums)]
        resident = pltpu.VMEM((2, self.k_size if self.by_keys else self.rows, LANES), jnp.int32)
        arrays = [x for arrays in inputs.values() for x in arrays]
        K = inputs["keys"][0].shape[2]

        def step(_, flags, *refs):
            body(flags[pl.program_id(1)], *refs)

        return tuple(pl.pallas_call(
            step,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                # The codes and flags of the pairs are in scalar memory before the kernel starts: the block specs read
                # them.
                num_scalar_prefetch=2,
                grid=(K, pairs.count[0]),
                in_specs=specs + sum_specs,
                out_specs=sum_specs,
                scratch_shapes=[resident, *(pltpu.VMEM(shape, jnp.float32) for shape in scratch)],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums],
            # Sums are updated in place, so that blocks without work keep their values.
            input_output_aliases={2 + len(arrays) + i: i for i in range(len(sums))},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=self.interpret,
        )(pairs.codes, pairs.flags, *arrays, *sums))  # fmt: skip

    def _spec(self, kind: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        """The block of an array of this kind that a pair needs, as a function of the pair's code."""
        majors, minors = self.counts[::-1] if self.by_keys else self.counts

        def block_numbers(p: jax.Array, codes: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            # The inverse of the code in `pairs.Pairs`.
            major, minor = codes[p] // minors, codes[p] % minors
            b, major = major // majors, major % majors
            return (b, minor, major) if self.by_keys else (b, major, minor)

        def spec(block: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
            return pl.BlockSpec(block, lambda h, p, codes, _: index(h, *block_numbers(p, codes)))

        G, H = self.G, shape[-1]
        return {
            "q_coords": lambda: spec((None, 2, self.q_size), lambda h, b, i, j: (b, 0, i)),
            "k_coords": lambda: spec((None, 2, self.k_size), lambda h, b, i, j: (b, 0, j)),
            "rows": lambda: spec((None, None, G, self.q_size), lambda h, b, i, j: (b, h, 0, i)),
            "queries": lambda: spec((None, None, G, self.q_size, H), lambda h, b, i, j: (b, h, 0, i, 0)),
            "keys": lambda: spec((2, None, None, self.k_size, H), lambda h, b, i, j: (0, b, h, j, 0)),
        }[kind]()
