"""Lists which blocks of queries need which blocks of keys. The TPU kernel reads a list of pairs, the GPU kernel a
list per block.

The lists are computed from the spans of the blocks while the program runs. So attention over packed documents costs
what it would cost for each document separately.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.attention.mask import Mask, Span

# Bits of a pair's flags: it is the first or the last pair of its row; all of its keys are visible to all of its
# queries.
FIRST, LAST, WHOLE = 1, 2, 4


class Pairs(NamedTuple):
    """A list of block pairs, of which the first `count` are valid: codes int32 [n], flags int32 [n], count int32 [1].

    The list is sorted by rows: all pairs of one query block follow each other (or of one key block, if `by_keys`).
    The block that a row belongs to is its major block, and the other block of the pair is the minor one. The code of
    a pair is ((batch row * majors) + major) * minors + minor, where `majors` and `minors` are the numbers of such
    blocks in a batch row.
    """

    codes: jax.Array
    flags: jax.Array
    # The name hides a method of tuples.
    count: jax.Array  # type: ignore[assignment]


def list_pairs(
    mask: Mask, q: Span, k: Span, counts: tuple[int, int], *, by_keys: bool,
    start: tuple[jax.Array | int, ...] = (0, 0, 0),
) -> Pairs:  # fmt: skip
    """Lists the pairs of blocks in which some query sees some key.

    q, k     spans [B, blocks] of the blocks of queries and keys
    counts   the numbers of query blocks and key blocks in a whole batch row, of which q and k may be a part
    by_keys  sort the list by key blocks instead of query blocks
    start    the batch row, query block and key block at which q and k begin

    The list is never empty: if no query sees a key, it has one pair, in which nothing is visible.
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
    # Codes and the bit "visible throughout" are sorted together as one integer. Pairs that are not needed sort to the
    # end, where the next line overwrites them with a valid code.
    listed = jnp.sort(jnp.where(needed, 2 * codes + whole, end).ravel())
    listed = jnp.where(listed == end, 2 * codes[0, 0, 0], listed)
    codes, whole = listed // 2, listed % 2
    count = jnp.maximum(needed.sum(), 1).astype(jnp.int32)
    # A row begins and ends where the major block changes between neighbours in the list.
    changes, edge = codes[1:] // minors != codes[:-1] // minors, jnp.ones((1,), bool)
    first = jnp.concatenate([edge, changes])
    last = jnp.concatenate([changes, edge]) | (jnp.arange(codes.size) == count - 1)
    return Pairs(codes, first * FIRST + last * LAST + whole * WHOLE, count[None])


class Rows(NamedTuple):
    """For each major block the minor blocks that it needs: blocks int32 [B, majors, minors], counts int32 [B, majors,
    2].

    In row [b, major], the first counts[..., 0] blocks need the mask. Those from there to counts[..., 1] are visible
    throughout. The rest is not needed.
    """

    blocks: jax.Array
    counts: jax.Array


def list_rows(mask: Mask, q: Span, k: Span, *, by_keys: bool) -> Rows:
    """The key blocks that each query block needs, from spans [B, blocks]; with `by_keys` the query blocks per key
    block."""
    q, k = Span(*(x[:, :, None] for x in q)), Span(*(x[:, None] for x in k))
    needed, whole = mask.may_see(q, k), mask.sees_all(q, k)
    if by_keys:
        needed, whole = needed.swapaxes(1, 2), whole.swapaxes(1, 2)
    minors = needed.shape[2]
    # Sorts each row by (rank, index): blocks that need the mask, then blocks visible throughout, then the rest.
    rank = jnp.where(needed, whole.astype(jnp.int32), 2)
    ranked = rank * minors + jax.lax.broadcasted_iota(jnp.int32, needed.shape, 2)
    ranked = jax.lax.sort(ranked, dimension=2, is_stable=False)
    counts = jnp.stack([jnp.sum(needed & ~whole, axis=2), jnp.sum(needed, axis=2)], axis=2)
    return Rows(ranked % minors, counts.astype(jnp.int32))
