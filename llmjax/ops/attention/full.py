"""Attention with all scores at once: the reference that every other algorithm must equal. Memory grows with T x S.

Scaled dot-product attention (Vaswani et al. 2017) with grouped queries (Ainslie et al. 2023). Scores and softmax are
float32. A query that sees no key, such as padding, gets zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.ops.attention.isolation import restore_nonfinite, zero_nonfinite
from llmjax.ops.attention.mask import Mask
from llmjax.ops.logits import softcap as cap_scores
from llmjax.ops.position_bias import PositionBias

# The score of a hidden key. It is finite, so that a row of hidden keys gives no NaN in the forward or the backward
# pass.
HIDDEN_SCORE = -1e30


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
    position_bias: PositionBias | None = None,
) -> jax.Array:
    """out_BTNH, in the dtype of q. Scores are q k / sqrt(H). N must be a multiple of K.

    softcap  c of the soft-cap on scores, c * tanh(score / c) (Gemma 2, 2024); 0 is off
    sinks_N  a score for each head that takes part in every softmax of the head but has no value, so that a head may
             attend to nothing (Miller 2023, "Attention is off by one"; gpt-oss 2025)
    position_bias  what is added to the scores by the distance of key and query, before the soft-cap (T5)

    A non-finite number in one document of a row does not affect the other documents (`isolation`).
    """
    # A query is spoiled if it sees a key or value with a non-finite number, or holds one itself.
    fit_BSK = jnp.all(jnp.isfinite(k_BSKH) & jnp.isfinite(v_BSKH), axis=-1)
    # The number of spoiled keys that each query sees, as a matrix product of 0 and 1.
    visible_BTS, unfit_BSK = mask.dense_BTS().astype(jnp.float32), (~fit_BSK).astype(jnp.float32)
    spoiled_BTK = jnp.einsum("BTS,BSK->BTK", visible_BTS, unfit_BSK) > 0
    spoiled_BTN = jnp.repeat(spoiled_BTK, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    spoiled_BTN |= ~jnp.all(jnp.isfinite(q_BTNH), axis=-1)
    arrays = zero_nonfinite(q_BTNH), zero_nonfinite(k_BSKH), zero_nonfinite(v_BSKH)
    out_BTNH = attend_in_cache(*arrays, mask, softcap=softcap, sinks_N=sinks_N, position_bias=position_bias)
    return restore_nonfinite(out_BTNH, q_BTNH, spoiled_BTN)


def attend_in_cache(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
    position_bias: PositionBias | None = None,
) -> jax.Array:
    """`attend` without the isolation of documents: for rows with one document each, as in the cache of generation."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Query heads of a group share a key/value head: query head n reads key/value head n // G.
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible = mask.dense_BTS()[:, None, None]
    scores = scores * H**-0.5
    if position_bias is not None:
        bias_NBTS = position_bias.bias(mask.q_positions_BT[:, :, None], mask.k_positions_BS[:, None])
        scores += bias_NBTS.reshape(K, N // K, *bias_NBTS.shape[1:]).transpose(2, 0, 1, 3, 4)
    scores = jnp.where(visible, cap_scores(scores, softcap), HIDDEN_SCORE)
    if sinks_N is not None:
        sinks = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        # A sink is one more column of scores, which is dropped again after the softmax.
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (B, K, N // K, T, 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k_BSKH.shape[1]]
    # A query that sees nothing has equal scores, and so equal weights, which are set to 0 here.
    weights = jnp.where(visible, weights, 0.0).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
