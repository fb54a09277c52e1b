"""Which keys a query may attend to: one predicate over positions and segments that every attention algorithm uses.

Positions and segments travel with the tokens, so packing, ring attention, reordered layouts and the key/value cache
need no special case. A key is visible to a query if it belongs to the same document, is not padding, is not later
than the query (causal), and lies within the window. The first and the last (segment, position) of a block, its span,
decide whether a block of queries can need a block of keys at all.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.chunks import Chunks


class Span(NamedTuple):
    """The first and the last token of a block in the order of (segment, position), without padding.

    All five arrays have the same shape, one entry per block; four are int32. `padded` is bool, true if the block
    contains padding. A block of padding only has a first segment that is larger than its last segment, so that it
    overlaps nothing.
    """

    first_segment: jax.Array
    first_position: jax.Array
    last_segment: jax.Array
    last_position: jax.Array
    padded: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The visibility of keys to queries.

    q_segments_BT, k_segments_BS    int32, from 1; tokens of the same document have the same segment. 0 is padding,
                                    which sees nothing and is seen by nothing
    q_positions_BT, k_positions_BS  int32, the position within the document, from 0
    causal                          hide keys at later positions
    window                          hide keys that are `window` or more positions away; 0 means no window
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
        """bool, element by element, for arrays that broadcast to one shape."""
        visible = (q_segments == k_segments) & (q_segments != 0)
        if self.causal:
            visible &= k_positions <= q_positions
        if self.window:
            # Positions are only subtracted from, never added to: a sum could overflow int32 for positions close to
            # 2^31.
            visible &= k_positions > q_positions - self.window
            if not self.causal:
                visible &= k_positions - self.window < q_positions
        return visible

    def dense_BTS(self) -> jax.Array:
        """bool [B, T, S], true where the key is visible to the query."""
        q_segments_BT1, q_positions_BT1 = self.q_segments_BT[:, :, None], self.q_positions_BT[:, :, None]
        k_segments_B1S, k_positions_B1S = self.k_segments_BS[:, None, :], self.k_positions_BS[:, None, :]
        return self.visible(q_segments_BT1, q_positions_BT1, k_segments_B1S, k_positions_B1S)

    def may_see(self, q: Span, k: Span) -> jax.Array:
        """bool, for spans that broadcast: false only if no query of block q sees any key of block k.

        It is exact for blocks cut from packed documents in their order. In other orders it may be true without need.
        It uses only operators, so that it also works on numpy arrays.
        """
        # The ranges of segments must overlap.
        may = (q.first_segment <= k.last_segment) & (k.first_segment <= q.last_segment)
        if self.causal:
            # The earliest key must not come after the latest query.
            may &= _not_after(k.first_segment, k.first_position, q.last_segment, q.last_position)
        if self.window:
            # The latest key must be within the window before the earliest query, and the reverse if keys may come
            # later.
            reach = self.window - 1
            may &= _not_after(q.first_segment, q.first_position - reach, k.last_segment, k.last_position)
            if not self.causal:
                may &= _not_after(k.first_segment, k.first_position - reach, q.last_segment, q.last_position)
        return may

    def sees_all(self, q: Span, k: Span) -> jax.Array:
        """bool, for spans that broadcast: true only if every query of block q sees every key of block k, so that no
        mask is needed."""
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
        """The mask of T queries from index `q_start` on and S keys from index `k_start` on."""
        q_segments_BT, q_positions_BT = (
            jax.lax.dynamic_slice_in_dim(x, q_start, T, 1) for x in (self.q_segments_BT, self.q_positions_BT)
        )
        k_segments_BS, k_positions_BS = (
            jax.lax.dynamic_slice_in_dim(x, k_start, S, 1) for x in (self.k_segments_BS, self.k_positions_BS)
        )
        return Mask(q_segments_BT, k_segments_BS, q_positions_BT, k_positions_BS, self.causal, self.window)


def _not_after(
    segment: jax.Array, position: jax.Array, end_segment: jax.Array, end_position: jax.Array
) -> jax.Array:
    """Whether (segment, position) <= (end_segment, end_position), in this order of precedence."""
    return (segment < end_segment) | ((segment == end_segment) & (position <= end_position))


def span_of(segments: jax.Array, positions: jax.Array) -> Span:
    """The spans of blocks whose tokens lie along the last axis; the other axes count blocks."""
    # Padding (segment 0) must not be the first token, so it counts as the largest segment in the minimum.
    highest = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(segments == 0, highest, segments), axis=-1, keepdims=True)
    last = jnp.max(segments, axis=-1, keepdims=True)
    first_position = jnp.min(jnp.where(segments == first, positions, highest), axis=-1)
    last_position = jnp.max(jnp.where(segments == last, positions, 0), axis=-1)
    padded = jnp.any(segments == 0, axis=-1)
    return Span(first[..., 0], first_position, last[..., 0], last_position, padded)


def block_spans(segments_BX: jax.Array, positions_BX: jax.Array, size: int) -> Span:
    """The spans [B, blocks] of blocks of `size` tokens. The last block is filled with padding."""
    return span_of(*split_blocks(segments_BX, positions_BX, size))


def split_blocks(segments_BX: jax.Array, positions_BX: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Segments and positions [B, blocks, size]. The last block is filled with padding."""
    B, X = segments_BX.shape
    segments, positions = (
        jnp.pad(x, ((0, 0), (0, -X % size))).reshape(B, -1, size) for x in (segments_BX, positions_BX)
    )
    return segments, positions


def stack_coords(segments_BX: jax.Array, positions_BX: jax.Array, tokens: int) -> jax.Array:
    """Segments and positions [B, 2, tokens], filled with padding."""
    coords_B2X = jnp.stack([segments_BX, positions_BX], axis=1)
    return jnp.pad(coords_B2X, ((0, 0), (0, 0), (0, tokens - segments_BX.shape[1])))


def pad_spans(spans: Span, blocks: Chunks) -> Span:
    """Spans [B, blocks] extended to `blocks.padded` entries by spans of padding, which no query sees."""
    missing = blocks.padded - blocks.tokens
    empty = span_of(*(jnp.zeros((spans.padded.shape[0], missing, 1), jnp.int32) for _ in range(2)))
    return Span(*(jnp.concatenate([x, y], axis=1) for x, y in zip(spans, empty, strict=True)))


def self_mask(
    segments_BT: jax.Array, positions_BT: jax.Array, *, causal: bool = True, window: int = 0
) -> Mask:
    """The mask for a sequence that attends to itself."""
    return Mask(segments_BT, segments_BT, positions_BT, positions_BT, causal, window)


def cross_mask(q_segments_BT: jax.Array, k_segments_BS: jax.Array) -> Mask:
    """The mask for queries that attend to another sequence: a query sees all keys of the same segment number."""
    # The two sequences count positions independently, so all positions are 0, and the mask is not causal.
    nowhere_BT, nowhere_BS = jnp.zeros_like(q_segments_BT), jnp.zeros_like(k_segments_BS)
    return Mask(q_segments_BT, k_segments_BS, nowhere_BT, nowhere_BS, causal=False)
