"""Attention written out: the reference that every other algorithm must equal. Memory grows with T x S.

Scaled dot-product attention (Vaswani et al. 2017) with grouped queries (Ainslie et al. 2023); scores and softmax in
float32. A query that sees nothing (padding) gets zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.ops.attention.apart import answered, finite
from llmjax.ops.attention.mask import Mask
from llmjax.ops.logits import softcap as cap_scores

# Score of a key that is not visible; finite, so that a row of them stays free of NaN in both passes.
HIDDEN = -1e30


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """out_BTNH, in the dtype of q. N must be a multiple of K; scores are q k / sqrt(H).

    softcap  c caps the scores smoothly, c tanh(score / c) (Gemma 2, 2024); 0 is off
    sinks_N  a score for each head that takes part in every softmax and has no value, so that a head may attend to
             nothing (Miller 2023, "Attention is off by one"; gpt-oss 2025)

    What is not finite in one document of a row stays in that document (`apart`).
    """
    fit_BSK = jnp.all(jnp.isfinite(k_BSKH) & jnp.isfinite(v_BSKH), axis=-1)
    visible_BTS, unfit_BSK = mask.dense_BTS().astype(jnp.float32), (~fit_BSK).astype(jnp.float32)
    spoiled_BTK = jnp.einsum("BTS,BSK->BTK", visible_BTS, unfit_BSK) > 0
    spoiled_BTN = jnp.repeat(spoiled_BTK, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    spoiled_BTN |= ~jnp.all(jnp.isfinite(q_BTNH), axis=-1)
    arrays = finite(q_BTNH), finite(k_BSKH), finite(v_BSKH)
    return answered(attend_in_cache(*arrays, mask, softcap=softcap, sinks_N=sinks_N), q_BTNH, spoiled_BTN)


def attend_in_cache(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """`attend` for rows that hold one document each, such as a cache of keys and values. It reads keys once."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible = mask.dense_BTS()[:, None, None]
    scores = jnp.where(visible, cap_scores(scores * H**-0.5, softcap), HIDDEN)
    if sinks_N is not None:
        sinks = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (B, K, N // K, T, 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k_BSKH.shape[1]]
    weights = jnp.where(visible, weights, 0.0).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
