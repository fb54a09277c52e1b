"""Rotary position embedding (Su et al. 2021) in the half-split form of GPT-NeoX and Llama."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotation(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos, sin, each float32 [B, T, 1, H/2], of the angles position * theta ** (-2i/H). Shared by all layers."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x with the pair (i, i + H/2) of each head turned by its position's angle; computed in float32."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def sinusoid(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Fixed sinusoidal positions, float32 [B, T, D] (Vaswani et al. 2017, section 3.5; halves, not interleaved)."""
    frequencies = 10000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions_BT[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
