"""Sums over the documents that share a row. The tokens of a document may lie in any columns of the row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def segment_sums(x_BTC: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """For every token, the sum of `x_BTC` over all tokens of its own segment: float32 [B, T, C].

    A row has at most T segments, numbered from 1 on. Padding, which is segment 0, counts as a segment like any other.
    """
    # The number of segments must be known when this is compiled, so it is the largest that there can be.
    return look_up_segments(segment_table(x_BTC, segments_BT, segments_BT.shape[1]), segments_BT)


def segment_table(x_BTC: jax.Array, segments_BT: jax.Array, num_segments: int) -> jax.Array:
    """For every segment, the sum of `x_BTC` over its tokens: float32 [B, num_segments + 1, C]. Entry 0 is padding."""

    def sums_of_row(x_TC: jax.Array, segments_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_TC, segments_T, num_segments=num_segments + 1)

    return jax.vmap(sums_of_row)(x_BTC.astype(jnp.float32), segments_BT)


def look_up_segments(table_BNC: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """For every token the entry of its segment, [B, T, C], from a table of `segment_table`."""
    return jax.vmap(lambda table_NC, segments_T: table_NC[segments_T])(table_BNC, segments_BT)
