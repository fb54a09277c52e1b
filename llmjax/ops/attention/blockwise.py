"""Blockwise attention in plain jax: exact, with linear memory, computing only blocks with visible keys.

A running softmax goes over the blocks of keys (Rabe and Staats 2021; FlashAttention: Dao et al. 2022). The backward
pass keeps q, k, v, out and the log-sum-exp of each row, and recomputes the softmax weights. Which key blocks a query
block needs is computed from segments and positions while the program runs, for each batch row separately. So
attention over packed documents costs what it would cost for each document separately.

Scores are stored with the keys first, [S, T]. Then the softmax reduces over rows, the gradients of keys and values
come out in the layout in which they are stored, and every matrix product is a plain one on XLA's CPU backend, which
takes three times as long if the left operand is contracted over its rows. The dimension letter r stands for the rows
of a query block: its queries for each query head of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops import chunks
from llmjax.ops.attention import kernel
from llmjax.ops.attention.full import HIDDEN_SCORE
from llmjax.ops.attention.isolation import is_finite, mark_nonfinite_values, zero_nonfinite
from llmjax.ops.attention.kernel import KernelArray, Softmax
from llmjax.ops.attention.mask import Mask, Span, span_of, split_blocks
from llmjax.ops.logits import softcap as cap_scores
from llmjax.ops.position_bias import PositionBias


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
    position_bias: PositionBias | None = None,
    block: int = 64,
) -> jax.Array:
    """out_BTNH, in the dtype of q, equal to `full.attend`. Scores and softmax are float32.

    `block` is the most tokens of a block, for queries and keys alike. The arrays lie on one device, or are the
    device's part inside `jax.shard_map`.
    """
    return kernel.attend(Blockwise(softcap, block), q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, position_bias)


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """The contracts `Kernel` and `BiasedKernel` in plain jax, for any platform. Queries have the layout q_BIKrH
    and keys kv_2BJKsH.

    I and J are the numbers of query blocks and key blocks, s the keys of a block.
    """

    softcap: float = 0.0
    block: int = 64

    def cut_queries(self, x_BTNH: jax.Array, K: int) -> KernelArray:
        B, T, N, H = x_BTNH.shape
        blocks = chunks.cut(T, self.block)
        # [B, T, N, H] -> [B, I, size, K, G, H] -> [B, I, K, G, size, H]; then G and size become r.
        x = blocks.split(x_BTNH, 1).reshape(B, -1, blocks.size, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(B, -1, K, N // K * blocks.size, H)

    def join_queries(self, x_BIKrH: KernelArray, T: int) -> jax.Array:
        B, _, K, r, H = x_BIKrH.shape
        blocks = chunks.cut(T, self.block)
        x = x_BIKrH.reshape(B, -1, K, r // blocks.size, blocks.size, H).transpose(0, 1, 4, 2, 3, 5)
        return blocks.join(x.reshape(B, -1, blocks.size, K * (r // blocks.size), H), 1)

    def cut_keys(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> KernelArray:
        K = k_BSKH.shape[2]
        return jnp.stack([self.cut_queries(k_BSKH, K), self.cut_queries(v_BSKH, K)])

    def join_keys(self, kv_2BJKsH: KernelArray, S: int) -> tuple[jax.Array, jax.Array]:
        return self.join_queries(kv_2BJKsH[0], S), self.join_queries(kv_2BJKsH[1], S)

    def forward(self, q: KernelArray, kv: KernelArray, mask: Mask, softmax: Softmax) -> Softmax:
        return self.forward_biased(q, kv, mask, softmax, None)

    def forward_biased(
        self,
        q: KernelArray,
        kv: KernelArray,
        mask: Mask,
        softmax: Softmax,
        position_bias: PositionBias | None,
    ) -> Softmax:
        q_coords, k_coords = _coords(mask, self.block)
        k, v = mark_nonfinite_values(*kv)
        keys = _merge((k, v.swapaxes(3, 4), *k_coords[:2]))

        def rows(_, arrays):
            q_KrH, row, q_coord, out_KrH, lse_Kr = arrays
            score = self._scorer(mask, q_KrH, q_coord, position_bias)

            # One step of the online softmax: rescale what was summed under the old largest score, and add this block.
            def add(at, carry):
                out_KHr, largest_Kr, total_Kr = carry
                k_KsH, v_KHs, *k_coord = _take(keys, at)
                scores_Ksr = score(k_KsH, *k_coord)[1]
                new_Kr = jnp.maximum(largest_Kr, jnp.max(scores_Ksr, axis=1))
                weights_Ksr = jnp.exp(scores_Ksr - new_Kr[:, None])
                # The weights of earlier keys were relative to the old largest score.
                shrink_Kr = jnp.exp(largest_Kr - new_Kr)
                out_KHr = out_KHr * shrink_Kr[:, None] + _dot(
                    "KHs,Ksr->KHr", v_KHs, weights_Ksr.astype(v_KHs.dtype)
                )
                return out_KHr, new_Kr, total_Kr * shrink_Kr + jnp.sum(weights_Ksr, axis=1)

            # The softmax so far counts as one key with score lse, weight 1 and value out.
            start = out_KrH.swapaxes(1, 2).astype(jnp.float32), lse_Kr, jnp.ones_like(lse_Kr)
            out_KHr, largest_Kr, total_Kr = _over_needed(mask, row, q_coord, k_coords, add, start)
            out_KrH = (out_KHr / total_Kr[:, None]).swapaxes(1, 2)
            return None, (out_KrH, largest_Kr + jnp.log(total_Kr))

        arrays = _merge((q, _row_numbers(q), q_coords, *softmax))
        # Results leave the loop in float32: where a loop writes a block into a bfloat16 array, XLA on CPU converts the
        # whole array to float32 and back.
        out, lse = jax.lax.scan(rows, None, arrays)[1]
        return _split(out, q.shape[0]).astype(softmax[0].dtype), _split(lse, q.shape[0])

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
        return self._gradients(q, kv, mask, dout, lse, delta, dq, dkv, None)[:2]

    def backward_biased(
        self,
        q: KernelArray,
        kv: KernelArray,
        mask: Mask,
        dout: KernelArray,
        lse: KernelArray,
        delta: KernelArray,
        position_bias: PositionBias,
    ) -> tuple[KernelArray, KernelArray, jax.Array]:
        zeros = jnp.zeros_like(q), jnp.zeros_like(kv)
        gradients: Any = self._gradients(q, kv, mask, dout, lse, delta, *zeros, position_bias)
        return gradients

    def _gradients(
        self,
        q: KernelArray,
        kv: KernelArray,
        mask: Mask,
        dout: KernelArray,
        lse: KernelArray,
        delta: KernelArray,
        dq: KernelArray | None,
        dkv: KernelArray | None,
        position_bias: PositionBias | None,
    ) -> tuple[KernelArray | None, KernelArray | None, jax.Array | None]:
        """The results of `backward`, and the gradient of the table of the bias, if there is one."""
        q_coords, k_coords = _coords(mask, self.block)
        B, scale = q.shape[0], q.shape[-1] ** -0.5
        # Zeroing the weights of spoiled rows (lse = inf) and non-finite operands once is cheaper than selecting per
        # pair of tokens, because here all weights of hidden keys are exactly 0.
        spoiled = ~(is_finite(lse) & is_finite(delta))
        lse, delta = jnp.where(spoiled, jnp.inf, lse), jnp.where(spoiled, 0.0, delta)
        # The barrier lets XLA make the transposed copy from k, not from kv with the same arithmetic once more.
        k, v = jax.lax.optimization_barrier((zero_nonfinite(kv[0]), zero_nonfinite(kv[1])))
        keys = _merge((k, k.swapaxes(3, 4), v, *k_coords[:2]))

        def rows(sums, arrays):
            q_KrH, dout_KrH, lse_Kr, delta_Kr, row, q_coord = arrays
            q_KrH, dout_KrH = zero_nonfinite(q_KrH), zero_nonfinite(dout_KrH)
            score = self._scorer(mask, q_KrH, q_coord, position_bias)

            def add(at, carry):
                dq_KHr, (dkv, dtable_RN) = carry
                k_KsH, k_KHs, v_KsH, *k_coord = _take(keys, at)
                capped_Ksr, scores_Ksr = score(k_KsH, *k_coord)
                weights_Ksr = jnp.exp(scores_Ksr - lse_Kr[:, None])
                # The gradient of the softmax: weight * (d weight - delta). If scores are soft-capped, the derivative
                # of the cap follows.
                dscores_Ksr = weights_Ksr * (_dot("KsH,KrH->Ksr", v_KsH, dout_KrH) - delta_Kr[:, None])
                if self.softcap:
                    dscores_Ksr *= 1.0 - jnp.square(capped_Ksr / self.softcap)
                if position_bias is not None:
                    dtable_RN += _table_gradient(position_bias, q_coord, k_coord[1], dscores_Ksr)
                # Matrix products read the compute dtype and add up in float32.
                weights_Ksr, dscores_Ksr = (x.astype(q_KrH.dtype) for x in (weights_Ksr, dscores_Ksr))
                if dq_KHr is not None:
                    dq_KHr += _dot("KHs,Ksr->KHr", k_KHs, dscores_Ksr)
                if dkv is not None:
                    dk_KsH = _dot("Ksr,KrH->KsH", dscores_Ksr, q_KrH)
                    dv_KsH = _dot("Ksr,KrH->KsH", weights_Ksr, dout_KrH)
                    dkv = _add_at(dkv[0], at, dk_KsH), _add_at(dkv[1], at, dv_KsH)
                return dq_KHr, (dkv, dtable_RN)

            start = None if dq is None else jnp.zeros(q_KrH.swapaxes(1, 2).shape, jnp.float32)
            dq_KHr, sums = _over_needed(mask, row, q_coord, k_coords, add, (start, sums))
            return sums, None if dq_KHr is None else dq_KHr.swapaxes(1, 2) * scale

        # Gradients are summed in float32, and rounded once when they are added to dq and dkv.
        sums = None if dkv is None else 2 * (jnp.zeros(keys[0].shape, jnp.float32),)
        dtable_RN = None if position_bias is None else jnp.zeros(position_bias.table_RN.shape, jnp.float32)
        arrays = _merge((q, dout, lse, delta, _row_numbers(q), q_coords))
        (sums, dtable_RN), more = jax.lax.scan(rows, (sums, dtable_RN), arrays)
        if dkv is not None and sums is not None:
            dk, dv = (_split(x, B) for x in sums)
            dkv = jnp.stack([_added(dkv[0], dk * scale), _added(dkv[1], dv)])
        if dq is not None:
            dq = jnp.where(spoiled[..., None], jnp.nan, _added(dq, _split(more, B)))
        return dq, dkv, dtable_RN

    def _scorer(
        self, mask: Mask, q_KrH: jax.Array, q_coord: _Coords, position_bias: PositionBias | None
    ) -> Callable[..., Any]:
        """Returns `score(k_KsH, segments_s, positions_s) -> (capped, scores)`: soft-capped scores_Ksr, before and after
        the mask."""
        heads, scale = q_KrH.shape[1] // q_coord.segments.size, q_KrH.shape[2] ** -0.5
        # All query heads of a group have the same tokens, so the coordinates are repeated for each head.
        segments_1r, positions_1r = (jnp.tile(x, heads)[None] for x in q_coord[:2])

        def score(
            k_KsH: jax.Array, segments_s: jax.Array, positions_s: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            raw_Ksr = _dot("KsH,KrH->Ksr", k_KsH, q_KrH) * scale
            if position_bias is not None:
                bias_Nst = position_bias.bias(q_coord.positions[None], positions_s[:, None])
                # Head n reads the key/value head n // G.
                bias_KGst = bias_Nst.reshape(-1, heads, *bias_Nst.shape[1:])
                raw_Ksr += bias_KGst.swapaxes(1, 2).reshape(raw_Ksr.shape)
            capped_Ksr = cap_scores(raw_Ksr, self.softcap)
            visible_sr = mask.visible(segments_1r, positions_1r, segments_s[:, None], positions_s[:, None])
            return capped_Ksr, jnp.where(visible_sr[None], capped_Ksr, HIDDEN_SCORE)

        return score


def _table_gradient(
    position_bias: PositionBias, q_coord: _Coords, positions_s: jax.Array, dscores_Ksr: jax.Array
) -> jax.Array:
    """The gradient of `position_bias.table_RN` from those of the scores of a pair of blocks."""
    shares_stR = position_bias.shares(q_coord.positions[None], positions_s[:, None])
    dscores_KsGt = dscores_Ksr.reshape(*dscores_Ksr.shape[:2], -1, q_coord.positions.size)
    return _dot("KsGt,stR->RKG", dscores_KsGt, shares_stR).reshape(position_bias.table_RN.shape)


class _Coords(NamedTuple):
    """Segments and positions of the tokens in blocks, [..., size], and the span of each block, [...]."""

    segments: jax.Array
    positions: jax.Array
    span: Span


def _coords(mask: Mask, block: int) -> tuple[_Coords, _Coords]:
    """The coordinates of the query blocks and the key blocks."""

    def coords(segments_BX: jax.Array, positions_BX: jax.Array) -> _Coords:
        segments, positions = split_blocks(
            segments_BX, positions_BX, chunks.cut(segments_BX.shape[1], block).size
        )
        return _Coords(segments, positions, span_of(segments, positions))

    q_coords = coords(mask.q_segments_BT, mask.q_positions_BT)
    return q_coords, coords(mask.k_segments_BS, mask.k_positions_BS)


def _over_needed(
    mask: Mask, row: jax.Array, q_coord: _Coords, k_coords: _Coords, add: Callable[..., Any], carry: Any
) -> Any:
    """Calls `carry = add(at, carry)` for each key block that a query block of the batch row `row` needs. `at` is the
    index of the key block among those of all rows."""
    needed_J = mask.may_see(q_coord.span, _take(k_coords.span, row))
    J = needed_J.size
    numbers_J = jnp.arange(J)

    def needed_from(at: jax.Array | int) -> jax.Array:
        return jnp.min(jnp.where(needed_J & (numbers_J >= at), numbers_J, J))

    # A while loop that jumps from one needed block to the next: blocks that are not needed cost nothing.
    return jax.lax.while_loop(
        lambda state: state[0] < J,
        lambda state: (needed_from(state[0] + 1), add(row * J + state[0], state[1])),
        (needed_from(0), carry),
    )[1]


def _row_numbers(x_BI: jax.Array) -> jax.Array:
    """The batch row of each block, int32 [B, I]."""
    return jax.lax.broadcasted_iota(jnp.int32, x_BI.shape[:2], 0)


def _merge(tree: Any) -> Any:
    """Arrays [B, I, ...] as [B * I, ...]: the blocks of all batch rows in one list. A loop over batch rows would copy
    each row before its blocks are read."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _split(x: jax.Array, B: int) -> jax.Array:
    """The inverse of `_merge`."""
    return x.reshape(B, -1, *x.shape[1:])


def _added(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, computed in float32 and rounded to the dtype of x."""
    return (x.astype(jnp.float32) + y).astype(x.dtype)


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum that adds up in float32."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _take(blocks: Any, at: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), blocks)


def _add_at(blocks: jax.Array, at: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(blocks, _take(blocks, at) + x, at, 0)
