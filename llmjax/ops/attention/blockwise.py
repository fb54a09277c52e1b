"""Exact attention by blocks of queries and of keys. Memory is linear in T, and only visible blocks cost time.

A running softmax goes over the blocks of keys (Rabe and Staats 2021; FlashAttention: Dao et al. 2022); the backward
pass keeps q, k, v, out and each row's log-sum-exp, and forms the weights anew. Which blocks of keys a block of queries
needs is read from segments and positions while it runs, row by row of the batch: documents packed into one sequence
cost what they would cost apart.

Scores lie with the keys first, [S, T]: then the softmax reduces over rows, every product is a plain one on XLA's CPU
backend (three times slower where the left operand is contracted over its rows), and the gradients of keys and values
come out as they are stored. The letter r stands for the rows of a block: its queries, head by head of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops import chunks
from llmjax.ops.attention import kernel
from llmjax.ops.attention.apart import finite, is_finite, marked
from llmjax.ops.attention.full import HIDDEN
from llmjax.ops.attention.kernel import Cut, Softmax
from llmjax.ops.attention.mask import Mask, Span, blocks_of, span_of
from llmjax.ops.logits import softcap as cap_scores


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
    block: int = 128,
) -> jax.Array:
    """out_BTNH, in the dtype of q, equal to `full.attend`. Scores and softmax are float32.

    Blocks of at most `block` queries meet as many keys at a time. The arrays lie on one device, or are its part in
    `jax.shard_map`.
    """
    return kernel.attend(Blockwise(softcap, block), q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """The `Kernel` contract in plain jax, for any backend. Queries are cut to q_BIKrH, keys to kv_2BJKsH."""

    softcap: float = 0.0
    block: int = 128

    def cut_queries(self, x_BTNH: jax.Array, K: int) -> Cut:
        B, T, N, H = x_BTNH.shape
        blocks = chunks.cut(T, self.block)
        x = blocks.split(x_BTNH, 1).reshape(B, -1, blocks.size, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(B, -1, K, N // K * blocks.size, H)

    def join_queries(self, x_BIKrH: Cut, T: int) -> jax.Array:
        B, _, K, r, H = x_BIKrH.shape
        blocks = chunks.cut(T, self.block)
        x = x_BIKrH.reshape(B, -1, K, r // blocks.size, blocks.size, H).transpose(0, 1, 4, 2, 3, 5)
        return blocks.join(x.reshape(B, -1, blocks.size, K * (r // blocks.size), H), 1)

    def cut_keys(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> Cut:
        K = k_BSKH.shape[2]
        return jnp.stack([self.cut_queries(k_BSKH, K), self.cut_queries(v_BSKH, K)])

    def join_keys(self, kv_2BJKsH: Cut, S: int) -> tuple[jax.Array, jax.Array]:
        return self.join_queries(kv_2BJKsH[0], S), self.join_queries(kv_2BJKsH[1], S)

    def forward(self, q: Cut, kv: Cut, mask: Mask, softmax: Softmax) -> Softmax:
        q_places, k_places = _places(mask, self.block)

        def sequence(arrays):
            q_IKrH, q_places, k_JKsH, v_JKHs, k_places, *softmax = arrays
            keys = k_JKsH, v_JKHs, k_places

            def rows(_, arrays):
                q_KrH, q_place, out_KrH, lse_Kr = arrays
                q_KHr = q_KrH.swapaxes(1, 2)
                meet = self._scorer(mask, q_KHr, q_place)

                def add(at, carry):
                    out_KHr, largest_Kr, total_Kr = carry
                    k_KsH, v_KHs, k_place = _take(keys, at)
                    scores_Ksr = meet(k_KsH, k_place)[1]
                    new_Kr = jnp.maximum(largest_Kr, jnp.max(scores_Ksr, axis=1))
                    weights_Ksr = jnp.exp(scores_Ksr - new_Kr[:, None])
                    shrink_Kr = jnp.exp(largest_Kr - new_Kr)
                    out_KHr = out_KHr * shrink_Kr[:, None] + _dot(
                        "KHs,Ksr->KHr", v_KHs, weights_Ksr.astype(v_KHs.dtype)
                    )
                    return out_KHr, new_Kr, total_Kr * shrink_Kr + jnp.sum(weights_Ksr, axis=1)

                start = out_KrH.swapaxes(1, 2).astype(jnp.float32), lse_Kr, jnp.ones_like(lse_Kr)
                out_KHr, largest_Kr, total_Kr = _over_needed(mask, q_place, k_places, add, start)
                out_KrH = (out_KHr / total_Kr[:, None]).swapaxes(1, 2).astype(out_KrH.dtype)
                return None, (out_KrH, largest_Kr + jnp.log(total_Kr))

            return jax.lax.scan(rows, None, (q_IKrH, q_places, *softmax))[1]

        k, v = marked(*kv)
        return jax.lax.map(sequence, (q, q_places, k, v.swapaxes(3, 4), k_places, *softmax))

    def backward(
        self, q: Cut, kv: Cut, mask: Mask, dout: Cut, lse: Cut, delta: Cut, dq: Cut | None, dkv: Cut | None
    ) -> tuple[Cut | None, Cut | None]:
        q_places, k_places = _places(mask, self.block)
        scale = q.shape[-1] ** -0.5
        # Cheaper here than a selection for each pair: products with weights of 0 are 0.
        spoiled = ~(is_finite(lse) & is_finite(delta))
        lse, delta = jnp.where(spoiled, jnp.inf, lse), jnp.where(spoiled, 0.0, delta)
        q, kv, dout = finite(q), finite(kv), finite(dout)

        def sequence(arrays):
            of_queries, keys, dkv = arrays

            def rows(dkv, arrays):
                q_KrH, dout_KrH, lse_Kr, delta_Kr, q_place, dq_KrH = arrays
                q_KHr, dout_KHr = q_KrH.swapaxes(1, 2), dout_KrH.swapaxes(1, 2)
                meet = self._scorer(mask, q_KHr, q_place)

                def add(at, carry):
                    dq_KHr, dkv = carry
                    k_KsH, k_KHs, v_KsH, k_place = _take(keys, at)
                    capped_Ksr, scores_Ksr = meet(k_KsH, k_place)
                    weights_Ksr = jnp.exp(scores_Ksr - lse_Kr[:, None])
                    dscores_Ksr = weights_Ksr * (_dot("KsH,KHr->Ksr", v_KsH, dout_KHr) - delta_Kr[:, None])
                    if self.softcap:
                        dscores_Ksr *= 1.0 - jnp.square(capped_Ksr / self.softcap)
                    weights_Ksr, dscores_Ksr = (x.astype(q_KrH.dtype) for x in (weights_Ksr, dscores_Ksr))
                    if dq_KHr is not None:
                        dq_KHr += _dot("KHs,Ksr->KHr", k_KHs, dscores_Ksr)
                    if dkv is not None:
                        dk_JKsH = _add_at(dkv[0], at, _dot("Ksr,KrH->KsH", dscores_Ksr, q_KrH))
                        dkv = dk_JKsH, _add_at(dkv[1], at, _dot("Ksr,KrH->KsH", weights_Ksr, dout_KrH))
                    return dq_KHr, dkv

                start = None if dq_KrH is None else jnp.zeros(q_KHr.shape, jnp.float32)
                dq_KHr, dkv = _over_needed(mask, q_place, keys[-1], add, (start, dkv))
                return dkv, None if dq_KHr is None else _added(dq_KrH, dq_KHr.swapaxes(1, 2) * scale)

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), dkv)
            more, dq_IKrH = jax.lax.scan(rows, zeros, of_queries)
            if dkv is not None:
                dkv = _added(dkv[0], more[0] * scale), _added(dkv[1], more[1])
            return dq_IKrH, dkv

        of_queries, keys = (q, dout, lse, delta, q_places, dq), (kv[0], kv[0].swapaxes(3, 4), kv[1], k_places)
        dq, dkv = jax.lax.map(sequence, (of_queries, keys, None if dkv is None else (dkv[0], dkv[1])))
        dq = None if dq is None else jnp.where(spoiled[..., None], jnp.nan, dq)
        return dq, None if dkv is None else jnp.stack(dkv)

    def _scorer(self, mask: Mask, q_KHr: jax.Array, q_place: _Places) -> Callable[..., Any]:
        """`meet(k_KsH, k_place) -> (capped, scores)`: scores_Ksr with soft-cap, before and after the mask."""
        heads, scale = q_KHr.shape[2] // q_place.segments.size, q_KHr.shape[1] ** -0.5
        segments_1r, positions_1r = (jnp.tile(x, heads)[None] for x in q_place[:2])

        def meet(k_KsH: jax.Array, k_place: _Places) -> tuple[jax.Array, jax.Array]:
            capped_Ksr = cap_scores(_dot("KsH,KHr->Ksr", k_KsH, q_KHr) * scale, self.softcap)
            visible_sr = mask.visible(
                segments_1r, positions_1r, k_place.segments[:, None], k_place.positions[:, None]
            )
            return capped_Ksr, jnp.where(visible_sr[None], capped_Ksr, HIDDEN)

        return meet


class _Places(NamedTuple):
    """Where the tokens of blocks stand, [..., size], and what each block spans, [...]."""

    segments: jax.Array
    positions: jax.Array
    span: Span


def _places(mask: Mask, block: int) -> tuple[_Places, _Places]:
    def places(segments_BX: jax.Array, positions_BX: jax.Array) -> _Places:
        segments, positions = blocks_of(
            segments_BX, positions_BX, chunks.cut(segments_BX.shape[1], block).size
        )
        return _Places(segments, positions, span_of(segments, positions))

    q_places = places(mask.q_segments_BT, mask.q_positions_BT)
    return q_places, places(mask.k_segments_BS, mask.k_positions_BS)


def _over_needed(mask: Mask, q_place: _Places, k_places: _Places, add: Callable[..., Any], carry: Any) -> Any:
    """`carry = add(at, carry)` for the number `at` of each block of keys that the block of queries needs."""
    needed_J = mask.may_see(q_place.span, k_places.span)
    numbers_J = jnp.arange(needed_J.size)

    def needed_from(at: jax.Array | int) -> jax.Array:
        return jnp.min(jnp.where(needed_J & (numbers_J >= at), numbers_J, needed_J.size))

    return jax.lax.while_loop(
        lambda state: state[0] < needed_J.size,
        lambda state: (needed_from(state[0] + 1), add(*state)),
        (needed_from(0), carry),
    )[1]


def _added(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) + y).astype(x.dtype)


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _take(blocks: Any, at: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), blocks)


def _add_at(blocks: jax.Array, at: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(blocks, _take(blocks, at) + x, at, 0)
