"""Dropout with a mask that depends on the token, not on the place of the token in the arrays.

Each token has a random key of its own, made from its packed sequence number and its column. The mask is therefore the
same for every micro-batch size, mesh and order of the tokens (layout invariance).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_keys(rng: jax.Array, index_B: jax.Array, columns_BT: jax.Array) -> jax.Array:
    """One random key per token, [B, T], from packed sequence numbers index_B and columns_BT."""
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(rng, index_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, columns_BT)


def dropout(x_BTD: jax.Array, keys_BT: jax.Array | None, rate: float, salt: int | jax.Array) -> jax.Array:
    """x_BTD with a share `rate` of its elements set to zero and the others divided by 1 - rate. Without keys it
    returns x_BTD.

    `salt` makes the masks of different places in one model differ, although they share the keys.
    """
    if keys_BT is None or rate == 0.0:
        return x_BTD

    # One draw per element of a token, all of them from the key of the token.
    def keep(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, salt), 1.0 - rate, x_BTD.shape[2:])

    return jnp.where(jax.vmap(jax.vmap(keep))(keys_BT), x_BTD / (1.0 - rate), 0.0).astype(x_BTD.dtype)
