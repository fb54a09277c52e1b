"""Dropout whose mask belongs to the token, not to the place where it happens to lie.

One key per packed sequence and column makes the mask the same however sequences are cut into micro-batches and devices,
and in whatever order their tokens lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_keys(rng: jax.Array, index_B: jax.Array, columns_BT: jax.Array) -> jax.Array:
    """One key [B, T] per packed sequence number and column."""
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(rng, index_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, columns_BT)


def dropout(x_BTD: jax.Array, keys_BT: jax.Array | None, rate: float, salt: int | jax.Array) -> jax.Array:
    """x with a share `rate` of its elements zeroed and the rest scaled by 1 / (1 - rate); the identity without keys.

    `salt` tells apart the places of one model that share the keys.
    """
    if keys_BT is None or rate == 0.0:
        return x_BTD

    def keep(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, x_BTD.shape[2:])

    return jnp.where(jax.vmap(jax.vmap(keep))(keys_BT), x_BTD / (1.0 - rate), 0.0).astype(x_BTD.dtype)
