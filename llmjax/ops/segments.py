"""Sums over the documents that share a row. The tokens of a document may lie in any columns of the row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_sums(x_BTC: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """For every token, the sum of `x_BTC` over all tokens of its own segment: float32 [B, T, C].

    A row has at most T segments, numbered from 1 on. Padding, which is segment 0, counts as a segment like any other.
    """
    T = segments_BT.shape[1]

    def sums_of_row(x_TC: jax.Array, segments_T: jax.Array) -> jax.Array:
        # The number of segments must be known when this is compiled, so it is the largest that there can be.
        sums_SC = jax.ops.segment_sum(x_TC, segments_T, num_segments=T + 1)
        return sums_SC[segments_T]

    return jax.vmap(sums_of_row)(x_BTC.astype(jnp.float32), segments_BT)
