"""Dropout whose mask belongs to the sequence, not to the batch it happens to sit in.

One key per sequence makes the mask the same however sequences are cut into micro-batches and devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sequence_keys(rng: jax.Array, index_B: jax.Array) -> jax.Array:
    """One key [B] per packed sequence number."""
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(index_B)


def dropout(x_BTD: jax.Array, keys_B: jax.Array | None, rate: float, salt: int | jax.Array) -> jax.Array:
    """x with a share `rate` of its elements zeroed and the rest scaled by 1 / (1 - rate); the identity without keys.

    `salt` tells apart the places of one model that share the keys.
    """
    if keys_B is None or rate == 0.0:
        return x_BTD

    def keep(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, x_BTD.shape[1:])

    return jnp.where(jax.vmap(keep)(keys_B), x_BTD / (1.0 - rate), 0.0).astype(x_BTD.dtype)
