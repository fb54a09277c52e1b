"""Attention kernels for GPUs, written in Pallas for Triton. They work through lists of the blocks that see each other.

A program holds a block of queries of one head, or a block of keys and values of one key/value head, and meets those
blocks of the other kind that segments, positions, causality and window let it see. They stand in a list that is found
while the computation runs, so a document costs what it would cost apart: first those that need the mask, then those
visible throughout, each part a loop without branches, whose loads the compiler can send ahead. A program with nothing
to do touches nothing. Blocks are read out of x_BTNH with strides; nothing is transposed. After FlashAttention 2 (Dao
2023), with lists as in FlexAttention (Dong et al. 2024). Softmax is computed to base 2, as the hardware does.
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
from llmjax.ops.attention.apart import finite, marked
from llmjax.ops.attention.full import HIDDEN
from llmjax.ops.attention.kernel import Cut, Softmax
from llmjax.ops.attention.mask import Mask, Span, block_spans, filled
from llmjax.ops.attention.pairs import Rows, list_rows

LEAST = 16  # rows and columns that a product of tiles must have
MOST_LISTED = 2**22  # blocks in the lists of one call: they lie in memory, 16 MiB
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
    """out_BTNH, in the dtype of q, equal to `full.attend`, on a GPU; `interpret` runs it anywhere, slowly.

    `block` is the most tokens of a block. Products of float32 are of the precision that jax is told to use.
    """
    return kernel.attend(PallasGPU(softcap, block, interpret), q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)


@dataclasses.dataclass(frozen=True)
class PallasGPU:
    """The `Kernel` contract on a GPU. Queries stay x_BTNH, keys become kv_2BSKH, T and S filled up to whole blocks.

    block  tokens of a block, at most, a power of two
    """

    softcap: float = 0.0
    block: int = 128
    interpret: bool = False

    def cut_queries(self, x_BTNH: jax.Array, K: int) -> Cut:
        return jnp.pad(x_BTNH, ((0, 0), (0, -x_BTNH.shape[1] % self._limit(x_BTNH.shape[1])), (0, 0), (0, 0)))

    def join_queries(self, x_BTNH: Cut, T: int) -> jax.Array:
        return x_BTNH[:, :T]

    def cut_keys(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> Cut:
        S = k_BSKH.shape[1]
        padding = ((0, 0), (0, 0), (0, -S % self._limit(S)), (0, 0), (0, 0))
        return jnp.pad(jnp.stack([k_BSKH, v_BSKH]), padding)

    def join_keys(self, kv_2BSKH: Cut, S: int) -> tuple[jax.Array, jax.Array]:
        return kv_2BSKH[0, :, :S], kv_2BSKH[1, :, :S]

    def forward(self, q: Cut, kv: Cut, mask: Mask, softmax: Softmax) -> Softmax:
        walk = self._walk(q, kv, mask, _tile(q, backward=False), by_keys=False)
        body = functools.partial(_forward_body, walk, self.softcap)
        out, lse = walk.run("attention", body, (q, _flat(kv)), softmax)
        return out, lse

    def backward(
        self, q: Cut, kv: Cut, mask: Mask, dout: Cut, lse: Cut, delta: Cut, dq: Cut | None, dkv: Cut | None
    ) -> tuple[Cut | None, Cut | None]:
        inputs, tile = (q, _flat(kv), dout, lse, delta), _tile(q, backward=True)
        if dq is not None:
            walk = self._walk(q, kv, mask, tile, by_keys=False)
            body = functools.partial(_backward_body_of_queries, walk, self.softcap)
            (dq,) = walk.run("attention_dq", body, inputs, (dq,))
        if dkv is not None:
            walk = self._walk(q, kv, mask, tile, by_keys=True)
            body = functools.partial(_backward_body_of_keys, walk, self.softcap)
            dkv = walk.run("attention_dkv", body, inputs, (_flat(dkv),))[0].reshape(dkv.shape)
        return dq, dkv

    def _limit(self, tokens: int) -> int:
        """The size of the largest block for `tokens`; the sizes of all other blocks divide it."""
        return min(self.block, max(LEAST, pl.next_power_of_2(tokens)))

    def _walk(self, q: Cut, kv: Cut, mask: Mask, tile: Tile, *, by_keys: bool) -> Walk:
        (_, T, N, H), (S, K) = q.shape, kv.shape[2:4]
        sizes = (tile.streamed, tile.resident) if by_keys else (tile.resident, tile.streamed)
        q_size, k_size = (min(size, self._limit(tokens)) for size, tokens in zip(sizes, (T, S)))
        return Walk(mask, T, S, N, K, H, q_size, k_size, by_keys, tile, self.interpret)


class Tile(NamedTuple):
    """Tokens of the block that a program holds and of those that it meets, warps that share the work, and how many of
    the blocks that it meets are on their way at once."""

    resident: int
    streamed: int
    warps: int
    stages: int


def _tile(q: jax.Array, *, backward: bool) -> Tile:
    """Sizes that fit the shared memory of every GPU since Ampere, 99 KiB of a block of threads, and its registers."""
    size = q.dtype.itemsize
    row = _width(q.shape[-1]) * size
    stages = 2 if row <= 1024 else 1

    def tokens(room: int, limit: int) -> int:
        return max(LEAST, min(limit, room // row))

    if backward:
        both = tokens(2**14, 128 // size)
        return Tile(both, both, 4, stages)
    return Tile(tokens(2**15, 128), tokens(2**14, 64), 8 if row == 256 else 4, stages)


class Place(NamedTuple):
    """What a program works on: the row of the batch, the block that it holds, and its head, of the kind of its sums.

    both   the rows of the batch in which keys and values stand, keys of all rows before values of all
    visit  `visit(add, carry)` is the carry after `carry = add(whole, block, i, carry)` for each block to be met, and
           each i of the heads of a group where the program holds keys
    """

    b: jax.Array
    both: tuple[jax.Array, jax.Array]
    block: jax.Array
    head: jax.Array
    visit: Callable[[Callable[..., Any], Any], Any]


@dataclasses.dataclass(frozen=True)
class Walk:
    """All pairs of blocks, of T queries and S keys filled up to whole blocks, that `mask` lets meet.

    by_keys  programs hold keys and meet queries, instead of the reverse
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
        """`sums` after `body` has worked on every block that has anything to do.

        name  of the kernel, in profiles
        body  gets its `Place`, and references to places_B2T of queries and places_B2S of keys, to each of the inputs
              and to each sum before and after
        """
        q_places = _places(self.mask.q_segments_BT, self.mask.q_positions_BT, self.T)
        k_places = _places(self.mask.k_segments_BS, self.mask.k_positions_BS, self.S)
        q = block_spans(q_places[:, 0], q_places[:, 1], self.q_size)
        k = block_spans(k_places[:, 0], k_places[:, 1], self.k_size)
        find = functools.partial(list_rows, self.mask, by_keys=self.by_keys)
        call = functools.partial(self._call, name, body, (q_places, k_places, *inputs))
        majors, minors = self.T // self.q_size, self.S // self.k_size
        if self.by_keys:
            majors, minors = minors, majors
        parts = chunks.cut(majors, MOST_LISTED // (q_places.shape[0] * minors))
        if parts.count == 1:
            return call(jnp.int32(0), find(q, k), sums)
        q, k = (q, filled(k, parts)) if self.by_keys else (filled(q, parts), k)

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
        heads, times = (self.K, self.G) if self.by_keys else (self.N, 1)
        B, majors = rows.counts.shape[:2]

        def program(start, blocks, counts, *refs):
            at, head, b = (pl.program_id(i) for i in range(3))
            # What is long begins first: with a causal mask that is the first keys, and the last queries.
            row = at if self.by_keys else majors - 1 - at
            masked, needed = counts[b, row, 0], counts[b, row, 1]

            def visit(add, carry):
                def take(whole, step, carry):
                    turn, i = jax.lax.div(step, times), jax.lax.rem(step, times)
                    return add(whole, blocks[b, row, turn], i, carry)

                carry = jax.lax.fori_loop(0, masked * times, functools.partial(take, False), carry)
                return jax.lax.fori_loop(masked * times, needed * times, functools.partial(take, True), carry)

            @pl.when(needed > 0)
            def _():
                body(Place(b, (b, B + b), start[0] + row, head, visit), *refs)

        arrays = (start[None], *rows, *inputs)
        return tuple(pl.pallas_call(
            program,
            grid=(majors, heads, B),
            in_specs=[self._spec(x) for x in (*arrays, *sums)],
            out_specs=[self._spec(x) for x in sums],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums],
            input_output_aliases={len(arrays) + i: i for i in range(len(sums))},
            compiler_params=plgpu.CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages),
            interpret=self.interpret,
            name=name,
        )(*arrays, *sums))  # fmt: skip

    def _spec(self, x: jax.Array) -> pl.BlockSpec:
        """All of an array, heads filled up to a power of two: `load` and `store` leave out what is not there."""
        shape = (*x.shape[:-1], _width(self.H)) if x.ndim == 4 else x.shape
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def queries(self, block: jax.Array) -> Any:
        return pl.ds(block * self.q_size, self.q_size)

    def keys(self, block: jax.Array) -> Any:
        return pl.ds(block * self.k_size, self.k_size)

    def load(self, ref: Any) -> jax.Array:
        """A block of a head [tokens, H], with zeros behind H."""
        if _width(self.H) == self.H:
            return plgpu.load(ref)
        return plgpu.load(ref, mask=self._there(), other=0.0)

    def store(self, ref: Any, x: jax.Array) -> None:
        plgpu.store(ref, x, mask=None if _width(self.H) == self.H else self._there())

    def _there(self) -> jax.Array:
        return (jnp.arange(_width(self.H)) < self.H)[None]

    def scores(self, x: jax.Array, y: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | None]:
        """Scores of x with y, to base 2, and what soft-cap multiplies their gradient by."""
        products, scale = _dot(x, y.T), self.H**-0.5
        if not softcap:
            return products * (scale * LOG2_E), None
        capped = jnp.tanh(products * (scale / softcap))
        return capped * (softcap * LOG2_E), 1.0 - capped * capped


def _flat(kv_2BSKH: Cut) -> jax.Array:
    return kv_2BSKH.reshape(-1, *kv_2BSKH.shape[2:])


def _width(H: int) -> int:
    return max(LEAST, pl.next_power_of_2(H))


def _places(segments_BX: jax.Array, positions_BX: jax.Array, tokens: int) -> jax.Array:
    """[B, 2, tokens], filled up with padding."""
    places_B2X = jnp.stack([segments_BX, positions_BX], axis=1)
    return jnp.pad(places_B2X, ((0, 0), (0, 0), (0, tokens - segments_BX.shape[1])))


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _forward_body(
    walk: Walk, softcap: float, at: Place, q_places, k_places, q, kv, out_before, lse_before, out, lse
):
    rows, kv_head = walk.queries(at.block), jax.lax.div(at.head, walk.G)
    q_block = walk.load(q.at[at.b, rows, at.head])
    q_place = q_places[at.b, 0, rows][:, None], q_places[at.b, 1, rows][:, None]

    def add(whole, block, _, carry):
        acc, largest, total = carry
        keys = walk.keys(block)
        k_block, v_block = (walk.load(kv.at[b, keys, kv_head]) for b in at.both)
        if not whole:
            k_block, v_block = marked(k_block, v_block)
        scores, _ = walk.scores(q_block, k_block, softcap)
        if not whole:
            k_place = k_places[at.b, 0, keys][None], k_places[at.b, 1, keys][None]
            scores = jnp.where(walk.mask.visible(*q_place, *k_place), scores, HIDDEN)
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
        acc = acc * shrink[:, None] + _dot(weights.astype(v_block.dtype), v_block)
        return acc, new, total * shrink + jnp.sum(weights, axis=1)

    largest = lse_before[at.b, rows, at.head] * LOG2_E
    acc = walk.load(out_before.at[at.b, rows, at.head]).astype(jnp.float32)
    acc, largest, total = at.visit(add, (acc, largest, jnp.ones_like(largest)))
    walk.store(out.at[at.b, rows, at.head], (acc / total[:, None]).astype(out.dtype))
    lse[at.b, rows, at.head] = (largest + jnp.log2(total)) / LOG2_E


def _backward_body_of_queries(
    walk: Walk, softcap: float, at: Place, q_places, k_places, q, kv, dout, lse, delta, dq_before, dq
):
    rows, kv_head = walk.queries(at.block), jax.lax.div(at.head, walk.G)
    q_block, dout_block = (walk.load(x.at[at.b, rows, at.head]) for x in (q, dout))
    q_place = q_places[at.b, 0, rows][:, None], q_places[at.b, 1, rows][:, None]
    lse_column = (lse[at.b, rows, at.head] * LOG2_E)[:, None]
    delta_column = delta[at.b, rows, at.head][:, None]

    def add(whole, block, _, acc):
        keys = walk.keys(block)
        k_block, v_block = (walk.load(kv.at[b, keys, kv_head]) for b in at.both)
        scores, slope = walk.scores(q_block, k_block, softcap)
        weights = jnp.exp2(scores - lse_column)
        dscores = weights * (_dot(dout_block, v_block.T) - delta_column)
        if slope is not None:
            dscores *= slope
        if not whole:
            k_place = k_places[at.b, 0, keys][None], k_places[at.b, 1, keys][None]
            dscores = jnp.where(walk.mask.visible(*q_place, *k_place), dscores, 0.0)
            k_block = finite(k_block)
        return acc + _dot(dscores.astype(k_block.dtype), k_block)

    acc = at.visit(add, jnp.zeros(q_block.shape, jnp.float32))
    before = walk.load(dq_before.at[at.b, rows, at.head]).astype(jnp.float32)
    walk.store(dq.at[at.b, rows, at.head], (before + acc * walk.H**-0.5).astype(dq.dtype))


def _backward_body_of_keys(
    walk: Walk, softcap: float, at: Place, q_places, k_places, q, kv, dout, lse, delta, dkv_before, dkv
):
    keys = walk.keys(at.block)
    k_block, v_block = (walk.load(kv.at[b, keys, at.head]) for b in at.both)
    k_place = k_places[at.b, 0, keys][:, None], k_places[at.b, 1, keys][:, None]

    def add(whole, block, i, carry):
        dk, dv = carry
        rows, head = walk.queries(block), at.head * walk.G + i
        q_block, dout_block = (walk.load(x.at[at.b, rows, head]) for x in (q, dout))
        scores, slope = walk.scores(k_block, q_block, softcap)
        weights = jnp.exp2(scores - (lse[at.b, rows, head] * LOG2_E)[None])
        dscores = weights * (_dot(v_block, dout_block.T) - delta[at.b, rows, head][None])
        if slope is not None:
            dscores *= slope
        if not whole:
            q_place = q_places[at.b, 0, rows][None], q_places[at.b, 1, rows][None]
            visible = walk.mask.visible(*q_place, *k_place)
            weights, dscores = jnp.where(visible, weights, 0.0), jnp.where(visible, dscores, 0.0)
            q_block, dout_block = finite(q_block), finite(dout_block)
        dv += _dot(weights.astype(dout_block.dtype), dout_block)
        return dk + _dot(dscores.astype(q_block.dtype), q_block), dv

    zeros = jnp.zeros(k_block.shape, jnp.float32)
    dk, dv = at.visit(add, (zeros, zeros))
    for b, more in zip(at.both, (dk * walk.H**-0.5, dv)):
        before = walk.load(dkv_before.at[b, keys, at.head]).astype(jnp.float32)
        walk.store(dkv.at[b, keys, at.head], (before + more).astype(dkv.dtype))
