"""The key/value cache of generation. Each slot carries a position and a segment, so that the usual attention mask
applies.

Each slot is written once, and its index has no meaning. Prompts of different lengths share one cache: a padding token
leaves a slot of segment 0, which no query sees.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of a batch of B rows with S slots each.

    k_LBSKH, v_LBSKH           keys and values in the compute dtype
    segments_BS, positions_BS  int32, of the token in each slot; segment 0 is an empty slot
    next_position_B            int32, the position of the next token of each row
    used                       int32 [], the number of slots written so far
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    segments_BS: jax.Array
    positions_BS: jax.Array
    next_position_B: jax.Array
    used: jax.Array


def make_cache(num_layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: str) -> Cache:
    """An empty cache with room for `slots` tokens per row."""
    kv = jnp.zeros((num_layers, batch, slots, kv_heads, head_dim), dtype)
    per_slot = jnp.zeros((batch, slots), jnp.int32)
    return Cache(kv, kv, per_slot, per_slot, jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32))


def select_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache whose row b is row rows_B[b] of `cache`."""
    return Cache(
        cache.k_LBSKH[:, rows_B],
        cache.v_LBSKH[:, rows_B],
        cache.segments_BS[rows_B],
        cache.positions_BS[rows_B],
        cache.next_position_B[rows_B],
        cache.used,
    )


def append_tokens(cache: Cache, valid_BT: jax.Array) -> tuple[Cache, jax.Array, jax.Array]:
    """Claims slots for T tokens per row. Returns the cache, and segments_BT and positions_BT of the new tokens.

    Tokens where `valid_BT` is false are padding and get segment 0. The keys and values of the claimed slots, from
    `used` - T on, are written later, layer by layer, by `write`.
    """
    # Padding takes a slot but no position, so positions count valid tokens only.
    counts_BT = jnp.cumsum(valid_BT.astype(jnp.int32), axis=1)
    positions_BT = cache.next_position_B[:, None] + counts_BT - valid_BT
    # A row of the cache is one document, segment 1.
    segments_BT = valid_BT.astype(jnp.int32)
    cache = dataclasses.replace(
        cache,
        segments_BS=jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, (0, cache.used)),
        positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, (0, cache.used)),
        next_position_B=cache.next_position_B + counts_BT[:, -1],
        used=cache.used + valid_BT.shape[1],
    )
    return cache, segments_BT, positions_BT


def write(cached_BSKH: jax.Array, new_BTKH: jax.Array, slot: jax.Array) -> jax.Array:
    """`cached_BSKH` with `new_BTKH` written from slot `slot` on."""
    return jax.lax.dynamic_update_slice(cached_BSKH, new_BTKH, (0, slot, 0, 0))
