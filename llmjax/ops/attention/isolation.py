"""Keeps an infinite or NaN number of one document away from the other documents of the same row.

A mask gives keys of other documents the weight 0, but 0 * NaN is NaN, so a weighted sum would spread a NaN to the
whole row. Where a kernel computes a block in which some tokens are hidden from each other, it therefore does two
things:

forward   An infinite or NaN value is replaced by 0, and its key by NaN. The mask selects scores with `where`, so that
          the NaN reaches the queries that see the key, and no others.
backward  Weights and gradients of scores are selected with `where`, and non-finite numbers in the queries, keys and
          output gradients that they are multiplied by are replaced by 0. A query that sees a non-finite number has
          NaN in its own scores, so its gradient is still NaN.

Blocks in which all tokens see each other lie within one document and need none of this. `blockwise` does not
distinguish such blocks and treats whole arrays once, before its loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def is_finite(x: jax.Array) -> jax.Array:
    """bool, of the shape of x. It uses only operations that every kernel language has."""
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def zero_nonfinite(x: jax.Array) -> jax.Array:
    """x with infinities and NaN replaced by 0."""
    return jnp.where(is_finite(x), x.astype(jnp.float32), 0.0).astype(x.dtype)


def mark_nonfinite_values(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [..., H] for a forward pass: values with non-finite numbers replaced by 0, and NaN in place of
    the keys of such values."""
    # A sum counts them: it is among the operations that every kernel language has.
    unfit = jnp.sum(jnp.where(is_finite(v), 0.0, 1.0), axis=-1, keepdims=True)
    return jnp.where(unfit > 0, jnp.nan, k.astype(jnp.float32)).astype(k.dtype), zero_nonfinite(v)


@jax.custom_vjp
def restore_nonfinite(out_BTNH: jax.Array, q_BTNH: jax.Array, spoiled_BTN: jax.Array) -> jax.Array:
    """out_BTNH with NaN in the rows where `spoiled_BTN`, for attention that jax differentiates.

    The gradient of q_BTNH is NaN where the row is spoiled or its output gradient is not finite, so that the failure
    shows; the gradient of out_BTNH is 0 there, so that it does not reach other documents.
    """
    return jnp.where(spoiled_BTN[..., None], jnp.nan, out_BTNH)


def _restore_forward(out_BTNH, q_BTNH, spoiled_BTN):
    return restore_nonfinite(out_BTNH, q_BTNH, spoiled_BTN), spoiled_BTN


def _restore_backward(spoiled_BTN, dout_BTNH):
    spoiled_BTN1 = (spoiled_BTN | ~jnp.all(jnp.isfinite(dout_BTNH), axis=-1))[..., None]
    zeros = jnp.zeros_like(dout_BTNH)
    return jnp.where(spoiled_BTN1, zeros, dout_BTNH), jnp.where(spoiled_BTN1, jnp.nan, zeros), None


restore_nonfinite.defvjp(_restore_forward, _restore_backward)
