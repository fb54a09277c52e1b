"""Who may attend to whom: one predicate over positions and segments, shared by every attention algorithm.

Positions and segments travel with the tokens, so packing, ring rotation, reordered layouts and the KV cache need no
special case: a key is visible if it belongs to the query's document, is no padding, is not in the future (causal) and
not further off than the window. The same two numbers of a block's first and last token tell which blocks of keys a
block of queries can need at all.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.chunks import Chunks


class Span(NamedTuple):
    """The first and the last token of a block in the order of (segment, position), padding left out.

    Arrays of one shape, int32. A block of nothing but padding has its first segment after its last. `padded`, bool:
    there is padding in it.
    """

    first_segment: jax.Array
    first_position: jax.Array
    last_segment: jax.Array
    last_position: jax.Array
    padded: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Visibility of keys to queries.

    q_segments_BT, k_segments_BS    int32, from 1; equal means same document; 0 is padding: sees and is seen by nothing
    q_positions_BT, k_positions_BS  int32; position within the document
    causal    keys at later positions are hidden
    window    only keys less than `window` positions off are visible; 0 means no window

    Positions are never added to, only taken from: a sum would overflow close to 2^31.
    """

    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})

    def visible(
        self, q_segments: jax.Array, q_positions: jax.Array, k_segments: jax.Array, k_positions: jax.Array
    ) -> jax.Array:
        """bool, element by element of arrays that broadcast to one shape."""
        visible = (q_segments == k_segments) & (q_segments != 0)
        if self.causal:
            visible &= k_positions <= q_positions
        if self.window:
            visible &= k_positions > q_positions - self.window
            if not self.causal:
                visible &= k_positions - self.window < q_positions
        return visible

    def dense_BTS(self) -> jax.Array:
        """bool [B, T, S], true where the key is visible."""
        q_segments_BT1, q_positions_BT1 = self.q_segments_BT[:, :, None], self.q_positions_BT[:, :, None]
        k_segments_B1S, k_positions_B1S = self.k_segments_BS[:, None, :], self.k_positions_BS[:, None, :]
        return self.visible(q_segments_BT1, q_positions_BT1, k_segments_B1S, k_positions_B1S)

    def may_see(self, q: Span, k: Span) -> jax.Array:
        """bool, for arrays of spans that broadcast: false where no query of q sees any key of k.

        Exact for blocks cut from packed documents in order; in any other order true now and then without need.
        """
        may = (q.first_segment <= k.last_segment) & (k.first_segment <= q.last_segment)
        if self.causal:
            may &= _up_to(k.first_segment, k.first_position, q.last_segment, q.last_position)
        if self.window:
            reach = self.window - 1
            may &= _up_to(q.first_segment, q.first_position - reach, k.last_segment, k.last_position)
            if not self.causal:
                may &= _up_to(k.first_segment, k.first_position - reach, q.last_segment, q.last_position)
        return may

    def sees_all(self, q: Span, k: Span) -> jax.Array:
        """bool, for arrays of spans that broadcast: true only where every query of q sees every key of k."""
        sees = (q.first_segment == q.last_segment) & (k.first_segment == k.last_segment)
        sees &= (q.first_segment == k.first_segment) & ~q.padded & ~k.padded
        if self.causal:
            sees &= k.last_position <= q.first_position
        if self.window:
            sees &= k.first_position > q.last_position - self.window
            if not self.causal:
                sees &= k.last_position - self.window < q.first_position
        return sees

    def part(self, q_start: jax.Array | int, T: int, k_start: jax.Array | int, S: int) -> Mask:
        """The mask of T queries and S keys from these indices on."""
        q_segments_BT, q_positions_BT = (
            jax.lax.dynamic_slice_in_dim(x, q_start, T, 1) for x in (self.q_segments_BT, self.q_positions_BT)
        )
        k_segments_BS, k_positions_BS = (
            jax.lax.dynamic_slice_in_dim(x, k_start, S, 1) for x in (self.k_segments_BS, self.k_positions_BS)
        )
        return Mask(q_segments_BT, k_segments_BS, q_positions_BT, k_positions_BS, self.causal, self.window)


def _up_to(
    segment: jax.Array, position: jax.Array, end_segment: jax.Array, end_position: jax.Array
) -> jax.Array:
    return (segment < end_segment) | ((segment == end_segment) & (position <= end_position))


def span_of(segments: jax.Array, positions: jax.Array) -> Span:
    """The span of the tokens of the last axis, for each index of the axes before it."""
    highest = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(segments == 0, highest, segments), axis=-1, keepdims=True)
    last = jnp.max(segments, axis=-1, keepdims=True)
    first_position = jnp.min(jnp.where(segments == first, positions, highest), axis=-1)
    last_position = jnp.max(jnp.where(segments == last, positions, 0), axis=-1)
    padded = jnp.any(segments == 0, axis=-1)
    return Span(first[..., 0], first_position, last[..., 0], last_position, padded)


def block_spans(segments_BX: jax.Array, positions_BX: jax.Array, size: int) -> Span:
    """The spans [B, blocks] of the blocks of `size` tokens, the last one filled up with padding."""
    return span_of(*blocks_of(segments_BX, positions_BX, size))


def blocks_of(segments_BX: jax.Array, positions_BX: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Segments and positions [B, blocks, size], the last block filled up with padding."""
    B, X = segments_BX.shape
    segments, positions = (
        jnp.pad(x, ((0, 0), (0, -X % size))).reshape(B, -1, size) for x in (segments_BX, positions_BX)
    )
    return segments, positions


def filled(spans: Span, blocks: Chunks) -> Span:
    """Spans [B, blocks], filled up with the spans of blocks of padding, which no query sees."""
    missing = blocks.padded - blocks.tokens
    empty = span_of(*(jnp.zeros((spans.padded.shape[0], missing, 1), jnp.int32) for _ in range(2)))
    return Span(*(jnp.concatenate([x, y], axis=1) for x, y in zip(spans, empty, strict=True)))


def self_mask(
    segments_BT: jax.Array, positions_BT: jax.Array, *, causal: bool = True, window: int = 0
) -> Mask:
    """The mask of a sequence attending to itself."""
    return Mask(segments_BT, segments_BT, positions_BT, positions_BT, causal, window)


def cross_mask(q_segments_BT: jax.Array, k_segments_BS: jax.Array) -> Mask:
    """The mask of sequences attending to others: queries see all keys of the segment of their number."""
    nowhere_BT, nowhere_BS = jnp.zeros_like(q_segments_BT), jnp.zeros_like(k_segments_BS)
    return Mask(q_segments_BT, k_segments_BS, nowhere_BT, nowhere_BS, causal=False)
