"""Label smoothing (Szegedy et al. 2016): a small part of each target is spread evenly over all ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.types import Head


def smoothing_sum(
    hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, weights_BT: jax.Array, smoothing: float
) -> jax.Array:
    """float32 [], what smoothing adds to the sum of weight * cross-entropy.

    The smoothed loss of a token is (1 - smoothing) * cross-entropy + smoothing * the mean over all ids of their
    cross-entropies. The normalisers of both cancel, so that it is the cross-entropy plus smoothing * (logit of the
    target - mean of all logits). Without a soft-cap, the mean of the logits is the product with the mean of the rows
    of the output matrix, and no logits are needed but those of the targets.
    """
    assert not head.softcap  # a soft-capped mean is not the mean of the soft-capped
    # The gradient of the rows is summed over tokens in float32, whatever the dtype of the matrix.
    w_VD = head.w_VD.astype(jnp.float32)
    rows_BTD = jnp.take(w_VD, targets_BT, axis=0, mode="clip") - jnp.mean(w_VD, axis=0)[None, None]
    # A token of weight 0 may hold infinities or NaN.
    hidden_BTD = jnp.where(weights_BT[..., None] == 0, 0.0, hidden_BTD.astype(jnp.float32))
    excess_BT = jnp.einsum("BTD,BTD->BT", hidden_BTD, rows_BTD)
    if head.bias_V is not None:
        excess_BT += jnp.take(head.bias_V, targets_BT, mode="clip") - jnp.mean(head.bias_V)
    return smoothing * jnp.sum(weights_BT * excess_BT)
