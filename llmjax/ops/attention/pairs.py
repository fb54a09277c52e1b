"""Which blocks of queries meet which blocks of keys: the lists that kernels work through, of pairs or row by row.

Found while the program runs, from the spans of the blocks, so that packed documents cost what they would cost apart.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.attention.mask import Mask, Span

FIRST, LAST, WHOLE = 1, 2, 4  # flags of a pair: the first or the last of its row; visible throughout


class Pairs(NamedTuple):
    """codes int32 [n], flags int32 [n], count int32 [1]: the pairs of the list are the first `count` of n.

    The list goes row by row: query block by query block, or key block by key block. A pair's code is
    ((row of the batch * majors) + major) * minors + minor, where major counts the blocks of one kind in a row of the
    batch and minor those of the other.
    """

    codes: jax.Array
    flags: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides a method of tuples


def list_pairs(
    mask: Mask, q: Span, k: Span, counts: tuple[int, int], *, by_keys: bool,
    start: tuple[jax.Array | int, ...] = (0, 0, 0),
) -> Pairs:  # fmt: skip
    """The pairs of the blocks of queries `q` and of keys `k`, spans [B, blocks], of which some token sees another.

    counts   blocks of queries and of keys in a row of the batch, of which q and k may be a part
    by_keys  key block by key block
    start    row of the batch, block of queries and block of keys at which q and k begin

    The list is never empty: where no token sees another, it has one pair, in which nothing is visible.
    """
    q, k = Span(*(x[:, :, None] for x in q)), Span(*(x[:, None] for x in k))
    needed, whole = mask.may_see(q, k), mask.sees_all(q, k)
    index = functools.partial(jax.lax.broadcasted_iota, jnp.int32, needed.shape)
    row, major, minor = (index(i) + start[i] for i in range(3))
    majors, minors = counts
    if by_keys:
        major, minor, majors, minors = minor, major, minors, majors
    codes = (row * majors + major) * minors + minor
    end = jnp.iinfo(jnp.int32).max
    listed = jnp.sort(jnp.where(needed, 2 * codes + whole, end).ravel())
    listed = jnp.where(listed == end, 2 * codes[0, 0, 0], listed)
    codes, whole = listed // 2, listed % 2
    count = jnp.maximum(needed.sum(), 1).astype(jnp.int32)
    turns, edge = codes[1:] // minors != codes[:-1] // minors, jnp.ones((1,), bool)
    first = jnp.concatenate([edge, turns])
    last = jnp.concatenate([turns, edge]) | (jnp.arange(codes.size) == count - 1)
    return Pairs(codes, first * FIRST + last * LAST + whole * WHOLE, count[None])


class Rows(NamedTuple):
    """blocks int32 [B, majors, minors], counts int32 [B, majors, 2]: what each block of one kind meets of the other.

    Of row [b, major], the first counts[..., 0] blocks need the mask, and those up to counts[..., 1] are visible
    throughout; what stands behind them is not needed.
    """

    blocks: jax.Array
    counts: jax.Array


def list_rows(mask: Mask, q: Span, k: Span, *, by_keys: bool) -> Rows:
    """What each block of queries needs of the blocks of keys, from spans [B, blocks]; `by_keys`: the reverse."""
    q, k = Span(*(x[:, :, None] for x in q)), Span(*(x[:, None] for x in k))
    needed, whole = mask.may_see(q, k), mask.sees_all(q, k)
    if by_keys:
        needed, whole = needed.swapaxes(1, 2), whole.swapaxes(1, 2)
    minors = needed.shape[2]
    rank = jnp.where(needed, whole.astype(jnp.int32), 2)
    ranked = rank * minors + jax.lax.broadcasted_iota(jnp.int32, needed.shape, 2)
    ranked = jax.lax.sort(ranked, dimension=2, is_stable=False)
    counts = jnp.stack([jnp.sum(needed & ~whole, axis=2), jnp.sum(needed, axis=2)], axis=2)
    return Rows(ranked % minors, counts.astype(jnp.int32))
