"""Who may attend to whom: one predicate over positions and segments, shared by every attention algorithm.

Positions and segments travel with the tokens, so packing, ring rotation, reordered layouts and the KV cache need no
special case: a key is visible if it belongs to the query's document, is no padding, is not in the future (causal) and
not further back than the window.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Visibility of keys to queries.

    q_segments_BT, k_segments_BS    int32; equal means same document; 0 is padding and sees and is seen by nothing
    q_positions_BT, k_positions_BS  int32; position within the document
    causal    keys at later positions are hidden
    window    only keys less than `window` positions back are visible; 0 means no window
    in_order  queries and keys are the same tokens, stored with segments contiguous and positions ascending, so that a
              causal key of a larger index is never visible: algorithms may skip such blocks without looking
    """

    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense_BTS(self) -> jax.Array:
        """bool [B, T, S], true where the key is visible."""
        q_segments, k_segments = self.q_segments_BT[:, :, None], self.k_segments_BS[:, None, :]
        visible_BTS = (q_segments == k_segments) & (q_segments != 0)
        if self.causal or self.window:
            distance_BTS = self.q_positions_BT[:, :, None] - self.k_positions_BS[:, None, :]
            if self.causal:
                visible_BTS &= distance_BTS >= 0
            if self.window:
                visible_BTS &= jnp.abs(distance_BTS) < self.window
        return visible_BTS


def self_mask(
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    causal: bool = True,
    window: int = 0,
    in_order: bool = True,
) -> Mask:
    """The mask of a sequence attending to itself."""
    return Mask(segments_BT, segments_BT, positions_BT, positions_BT, causal, window, in_order)
