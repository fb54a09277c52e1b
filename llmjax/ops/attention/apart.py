"""Keeps documents that share a row apart, also where one of them holds a number that is infinite or not a number.

A mask gives weight 0 to the keys of other documents, but 0 times NaN is NaN. So where some of the tokens that a kernel
brings together are hidden from one another, weights are selected, and what they are multiplied by is finite:

forward   A value that is not finite becomes 0, and its key NaN. Scores of hidden keys are selected, so that NaN reaches
          the queries that see the key, and no other.
backward  Weights and gradients of scores are selected, and queries, keys and output gradients that they are multiplied
          by have 0 in the place of what is not finite. A query that sees such a number has NaN in its own scores.

Blocks that see all of one another lie in one document, and need none of it.
`blockwise`, which does not tell them from others, does the same to whole arrays, once for all blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def is_finite(x: jax.Array) -> jax.Array:
    """bool, of the shape of x, in operations that every kernel language has."""
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def finite(x: jax.Array) -> jax.Array:
    """x with 0 in the place of what is not finite."""
    return jnp.where(is_finite(x), x.astype(jnp.float32), 0.0).astype(x.dtype)


def marked(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [..., H] for a forward pass: values are finite, and the keys of those that were not are NaN."""
    unfit = jnp.sum(jnp.where(is_finite(v), 0.0, 1.0), axis=-1, keepdims=True)
    return jnp.where(unfit > 0, jnp.nan, k.astype(jnp.float32)).astype(k.dtype), finite(v)


@jax.custom_vjp
def answered(out_BTNH: jax.Array, q_BTNH: jax.Array, spoiled_BTN: jax.Array) -> jax.Array:
    """out_BTNH with NaN for the rows that are `spoiled`, and q_BTNH's gradient, for attention that jax derives."""
    return jnp.where(spoiled_BTN[..., None], jnp.nan, out_BTNH)


def _answered_forward(out_BTNH, q_BTNH, spoiled_BTN):
    return answered(out_BTNH, q_BTNH, spoiled_BTN), spoiled_BTN


def _answered_backward(spoiled_BTN, dout_BTNH):
    spoiled_BTN1 = (spoiled_BTN | ~jnp.all(jnp.isfinite(dout_BTNH), axis=-1))[..., None]
    zeros = jnp.zeros_like(dout_BTNH)
    return jnp.where(spoiled_BTN1, zeros, dout_BTNH), jnp.where(spoiled_BTN1, jnp.nan, zeros), None


answered.defvjp(_answered_forward, _answered_backward)
