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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llmjax.ops.attention import kernel
from llmjax.ops.attention.full import HIDDEN_SCORE
from llmjax.ops.attention.gpu_schedule import (
    LOG2_E,
    MIN_TILE,
    BlockSchedule,
    ProgramContext,
    Tile,
    choose_tile,
    dot,
)
from llmjax.ops.attention.isolation import mark_nonfinite_values, zero_nonfinite
from llmjax.ops.attention.kernel import KernelArray, Softmax
from llmjax.ops.attention.mask import Mask


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
        schedule = self._schedule(q, kv, mask, choose_tile(q, backward=False), by_keys=False)
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
        inputs, tile = (q, _flat(kv), dout, lse, delta), choose_tile(q, backward=True)
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


def _flat(kv_2BSKH: KernelArray) -> jax.Array:
    """[2, B, S, K, H] -> [2 B, S, K, H], the four dimensions that `load` and `store` work with."""
    return kv_2BSKH.reshape(-1, *kv_2BSKH.shape[2:])


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
        acc = acc * shrink[:, None] + dot(weights.astype(v_block.dtype), v_block)
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
        dscores = weights * (dot(dout_block, v_block.T) - delta_column)
        if slope is not None:
            dscores *= slope
        if not whole:
            k_coord = k_coords[at.b, 0, keys][None], k_coords[at.b, 1, keys][None]
            dscores = jnp.where(schedule.mask.visible(*q_coord, *k_coord), dscores, 0.0)
            k_block = zero_nonfinite(k_block)
        return acc + dot(dscores.astype(k_block.dtype), k_block)

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
        dscores = weights * (dot(v_block, dout_block.T) - delta[at.b, rows, head][None])
        if slope is not None:
            dscores *= slope
        if not whole:
            q_coord = q_coords[at.b, 0, rows][None], q_coords[at.b, 1, rows][None]
            visible = schedule.mask.visible(*q_coord, *k_coord)
            weights, dscores = jnp.where(visible, weights, 0.0), jnp.where(visible, dscores, 0.0)
            q_block, dout_block = zero_nonfinite(q_block), zero_nonfinite(dout_block)
        dv += dot(weights.astype(dout_block.dtype), dout_block)
        return dk + dot(dscores.astype(q_block.dtype), q_block), dv

    zeros = jnp.zeros(k_block.shape, jnp.float32)
    dk, dv = at.visit(add, (zeros, zeros))
    for b, more in zip(at.both, (dk * schedule.H**-0.5, dv)):
        before = schedule.load(dkv_before.at[b, keys, at.head]).astype(jnp.float32)
        schedule.store(dkv.at[b, keys, at.head], (before + more).astype(dkv.dtype))
