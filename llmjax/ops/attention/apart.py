"""Documents that share a row stay apart, even where one of them holds a number that is infinite or not a number.

A mask gives weight 0 to the keys of other documents, but 0 times NaN is NaN, so products must not see such numbers at
all. They are taken out before a kernel runs, once for each array and not for each pair of blocks:

forward   A value that is not finite becomes 0, and its key NaN. Scores of hidden keys are selected, so that NaN reaches
          the queries that see the key, and no other.
backward  The row of a query whose softmax, output or output gradient is not finite takes no part in the gradients of
          keys and values, and its own gradient is NaN. A key that is not finite is seen by such rows alone: here it
          can be 0.

What is not finite thus stays visible in its own document, in the output or in the gradient of the queries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def marked(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values for a forward pass: values are finite, and NaN in a key stands for all that is not."""
    good = jnp.isfinite(v)
    k = jnp.where(jnp.isfinite(k) & good, k, jnp.nan)
    return jnp.where(jnp.isfinite(q), q, jnp.nan), k, jnp.where(good, v, 0)


def finite(x: jax.Array) -> jax.Array:
    """x with 0 in the place of what is not finite, for a backward pass."""
    return jnp.where(jnp.isfinite(x), x, 0)


def without_spoiled(lse: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(spoiled, lse, delta) of the rows of a softmax: those that are not finite are `spoiled`, and get no weights."""
    spoiled = ~(jnp.isfinite(lse) & jnp.isfinite(delta))
    return spoiled, jnp.where(spoiled, jnp.inf, lse), jnp.where(spoiled, 0.0, delta)


def with_spoiled(dq: jax.Array, spoiled: jax.Array) -> jax.Array:
    """The gradient of queries, with one dimension more than `spoiled`: NaN in the rows that were left out."""
    return jnp.where(spoiled[..., None], jnp.nan, dq)


@jax.custom_vjp
def answered(out_BTNH: jax.Array, q_BTNH: jax.Array, spoiled_BTN: jax.Array) -> jax.Array:
    """out_BTNH with NaN for the rows that are `spoiled`, for attention whose derivative jax forms by itself."""
    return with_spoiled(out_BTNH, spoiled_BTN)


def _answered_forward(out_BTNH, q_BTNH, spoiled_BTN):
    return answered(out_BTNH, q_BTNH, spoiled_BTN), spoiled_BTN


def _answered_backward(spoiled_BTN, dout_BTNH):
    spoiled_BTN |= ~jnp.all(jnp.isfinite(dout_BTNH), axis=-1)
    zeros = jnp.zeros_like(dout_BTNH)
    return jnp.where(spoiled_BTN[..., None], zeros, dout_BTNH), with_spoiled(zeros, spoiled_BTN), None


answered.defvjp(_answered_forward, _answered_backward)
