"""The bias that attention adds to a score by the distance of key and query: learned, or minus the distance (ALiBi).

The learned one is that of T5 (Raffel et al. 2020, section 2.1). Small distances have a bucket each. Larger ones share
buckets that grow with the logarithm of the distance, up to the last one, which holds all that is further away.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PositionBias:
    """The bias of a stack of layers. It reads positions, never array indices.

    table_RN    float32, the bias of each bucket for each query head
    distance    positions; keys at this distance or further away share the last bucket
    both_sides  whether queries see later keys as well. Half of the buckets is for those
    """

    table_RN: jax.Array
    distance: int = dataclasses.field(metadata={"static": True})
    both_sides: bool = dataclasses.field(metadata={"static": True})

    def buckets(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """int32, the bucket of each pair, for positions that broadcast to one shape."""
        ahead = k_positions - q_positions
        R = self.table_RN.shape[0] // (2 if self.both_sides else 1)
        far = jnp.abs(ahead) if self.both_sides else jnp.maximum(-ahead, 0)
        buckets = jnp.asarray(buckets_of(R, self.distance))[jnp.minimum(far, self.distance)]
        return buckets + R * (ahead > 0) if self.both_sides else buckets

    def shares(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 [..., R], how much each row of the table counts in the bias of each pair: its derivative."""
        return jax.nn.one_hot(
            self.buckets(q_positions, k_positions), self.table_RN.shape[0], dtype=jnp.float32
        )

    def bias(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 [N, ...], the bias of each pair for each head, for positions that broadcast to one shape."""
        return jnp.take(self.table_RN.T, self.buckets(q_positions, k_positions), axis=1, mode="clip")

    def part(self, start: jax.Array, heads: int) -> PositionBias:
        """The bias of `heads` query heads from `start` on."""
        table_RN = jax.lax.dynamic_slice_in_dim(self.table_RN, start, heads, axis=1)
        return dataclasses.replace(self, table_RN=table_RN)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearBias(PositionBias):
    """Minus the distance, times a number for each head that nobody learns (ALiBi: Press et al. 2022).

    table_RN  float32 [1, N], the number of each query head
    """

    def shares(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        return -jnp.abs(k_positions - q_positions).astype(jnp.float32)[..., None]

    def bias(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        return jnp.tensordot(self.table_RN[0], self.shares(q_positions, k_positions)[..., 0], axes=0)


def slopes(num_heads: int) -> np.ndarray:
    """float32 [N], how fast the scores of each head fall with the distance, as in the published code.

    For a power of two, a geometric series from 2 ** (-8 / N) to 2 ** -8. Otherwise the series of the next smaller
    power, and every second number of the one of the next larger power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    own = 2.0 ** (-8 / power * np.arange(1, power + 1))
    others = 2.0 ** (-4 / power * np.arange(1, 2 * (num_heads - power), 2))
    return np.concatenate([own, others]).astype(np.float32)


def buckets_of(R: int, distance: int) -> np.ndarray:
    """int32 [distance + 1], the bucket of each distance on one side of a query, which has R buckets.

    The logarithm is that of the published code, float32 and rounded down.
    """
    exact = R // 2
    far = np.arange(distance + 1)
    ratios = np.maximum(far, exact).astype(np.float32) / np.float32(exact)
    grown = np.log(ratios) / np.float32(math.log(distance / exact)) * np.float32(R - exact)
    return np.where(far < exact, far, np.minimum(exact + grown.astype(np.int32), R - 1)).astype(np.int32)
