"""Attention written out: the reference that every other algorithm must equal. Memory grows with T x S.

Scaled dot-product attention (Vaswani et al. 2017) with grouped queries (Ainslie et al. 2023); scores and softmax in
float32. A query that sees nothing (padding) gets zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.ops.attention.mask import Mask

NEGATIVE = -1e30  # finite, so that a fully masked row stays free of NaN in both passes


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, scale: float | None = None
) -> jax.Array:
    """out_BTNH, in the dtype of q. N must be a multiple of K; `scale` defaults to H ** -0.5."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible = mask.dense_BTS()[:, None, None]
    scores = jnp.where(visible, scores * (H**-0.5 if scale is None else scale), NEGATIVE)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
