"""Splits the longest documents of a row over groups of neighbouring shards, in chunks that keep each group even.

This is the first part of the layout `documents`; `by_documents` describes the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# At most this many of the longest documents are considered for splitting, and at most this many are placed whole. The
# limit bounds the work in Python; all further documents are short.
MAX_PLACED_SINGLY = 512
# A document may stay whole if its work is at most this part of a shard's share, however much the split documents do.
SMALL_WORK = 0.15
# Documents that need not be split fill a group only up to this part of its room, to leave room for short documents.
FULL_GROUP = 0.9
# A document that need not be split joins a group if the work of the group stays below this many times the highest.
MAX_GROUP_WORK = 1.02
# Group size -> the device of each chunk of a document; every device has two chunks. A search over all orders found that
# these wait less at the steps of the ring than a zigzag. tools/bench_layout.py counts the work of each layout.
PATTERNS = {
    3: (0, 1, 2, 1, 2, 0),
    4: (2, 3, 1, 0, 1, 0, 2, 3),
    5: (3, 1, 2, 0, 4, 4, 2, 0, 1, 3),
    6: (3, 1, 5, 2, 4, 0, 0, 2, 4, 3, 5, 1),
    8: (3, 2, 1, 0, 4, 6, 5, 7, 5, 4, 7, 6, 2, 3, 1, 0),
}


class Cuts(NamedTuple):
    """Parts of documents, int64 [cuts] each: tokens start to stop - 1 of `document` lie on `shard`."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    shard: np.ndarray


class Row(NamedTuple):
    """A row that is to be laid out over n shards.

    lengths  int64 [documents], the tokens of each document
    work     float [documents], the pairs of tokens that causal attention computes, in whole blocks, in each document
    room     int64 [n], the tokens of documents that each shard takes; the sum is the sum of `lengths`
    block    the tokens in a block of attention; chunks are multiples of it where possible
    """

    lengths: np.ndarray
    work: np.ndarray
    room: np.ndarray
    block: int


def choose_split(row: Row, longest_first: np.ndarray, size: int) -> np.ndarray:
    """Chooses the documents to split, and their groups.

    Args:
      row: the row that is laid out.
      longest_first: int64 [documents], the documents in descending order of length.
      size: the shards in a group. With groups of one shard no document is split.

    Returns:
      group: int64 [documents], the group over which each document is split, -1 for the documents that are not split.
    """
    group = np.full(len(row.lengths), -1)
    if size == 1:
        return group
    room = row.room.reshape(-1, size).sum(axis=1).tolist()
    share = float(row.work.sum()) / len(row.room)
    # The work of the group that has the most.
    level = float(row.work.max(initial=0.0))
    work, tokens = [0.0] * len(room), [0] * len(room)
    for document in longest_first[:MAX_PLACED_SINGLY].tolist():
        length, cost = int(row.lengths[document]), float(row.work[document])
        # A device has about level / size of work with split documents. A document with more work than the rest of the
        # device's share, or longer than half of a shard, must be split.
        must = cost > max(share - level / size, SMALL_WORK * share) or 2 * length > row.room[0]
        # Otherwise its two chunks on every device must fill a block each. All following documents are shorter.
        if not must and length < 2 * size * row.block:
            break
        # Short documents beside the split ones make the number of tokens exact.
        full = 1.0 if must else FULL_GROUP
        open_groups = [(done, g) for g, done in enumerate(work) if tokens[g] + length <= full * room[g]]
        if open_groups:
            # The group with the least work so far.
            done, g = min(open_groups)
            if must or done + cost <= MAX_GROUP_WORK * level:
                group[document] = g
                work[g] += cost
                tokens[g] += length
                level = max(level, work[g])
    return group


def split_widths(row: Row, members: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares out the tokens of the split documents over the shards of their groups.

    Args:
      members: for each group, the documents that are split over it.
      size: the shards in a group.

    Returns:
      width: int64 [n], the tokens of split documents on each shard.
      load: float [n], the pairs of these tokens of which query and key lie on the same shard.
    """
    width, load = np.zeros(len(row.room), np.int64), np.zeros(len(row.room))
    # The shards of a group in the order in which they get blocks that are left; the shard in the middle comes last.
    middle_last = (np.arange(size) + size // 2 + 1) % size
    for first, documents in zip(range(0, len(width), size), members):
        lengths, room = row.lengths[documents], row.room[first : first + size]
        total = int(lengths.sum())
        # All shards of the group get equally many whole blocks, if they have room for them.
        mine = np.minimum(total // size, room) // row.block * row.block
        left = total - int(mine.sum())
        # Whole blocks that are left go to single shards: first to those after the middle, then to those before it.
        for shard in middle_last[:-1]:
            if left >= row.block and room[shard] - mine[shard] >= row.block:
                mine[shard] += row.block
                left -= row.block
        # The rest, which fills no block, goes to the middle shard, or to shards before it if that has no room.
        for shard in middle_last[::-1]:
            more = min(left, int(room[shard] - mine[shard]))
            mine[shard] += more
            left -= more
        width[first : first + size] = mine
        # A shard with the part f of a document of L tokens has (f L)^2 / 2 pairs of them.
        square = float((lengths.astype(float) ** 2).sum())
        load[first : first + size] = (mine / max(1, total)) ** 2 * square / 2
    return width, load


def cut_split(
    row: Row, documents: np.ndarray, width: np.ndarray, before: np.ndarray, first: int, *, circle: bool
) -> Cuts:
    """Cuts documents that are split over one group of g shards, in two chunks for each shard and document.

    Chunks begin and end at the block borders of their shard where possible. The tokens that fill no block go to one
    shard, a different one for each document.

    Args:
      documents: the documents that are split over the group, the longest last.
      width: int64 [g], the tokens of these documents that each shard takes.
      before: int64 [g], the tokens that lie in front of these documents on each shard.
      first: the first shard of the group.
      circle: whether the group is the whole ring, in which a zigzag is even.
    """
    size, block = len(width), row.block
    zigzag = (*range(size), *reversed(range(size)))
    pattern = np.array(zigzag if circle else PATTERNS.get(size, zigzag))
    # slots[d] holds the numbers of the two chunks of shard d.
    slots = np.argsort(pattern, kind="stable").reshape(size, 2)
    # `done` counts the tokens of the documents so far, `given` how many of them each shard has taken.
    total, done, given, chunks = int(row.lengths[documents].sum()), 0, np.zeros(size, np.int64), []
    for number, length in enumerate(row.lengths[documents].tolist()):
        done += length
        # The tokens that fill the block of each shard that is begun.
        fill = -(before + given) % block
        # The last document takes all that is left of the widths.
        mine = width - given
        if done < total:
            # Each shard takes its part of the documents so far, in proportion to its width.
            want = width * done // total - given
            # The offset rounds up on some shards and down on others, so that the sum is nearly right.
            blocks = (want - fill + np.arange(size) * block // size) // block
            mine = _adjust_sum(fill + blocks * block, length, mine, (size // 2 + number) % size)
        # The first chunk fills the begun block and takes half of the other blocks. An odd block goes to the
        # second chunk, and to the first chunk in every other document.
        head = np.minimum(fill, mine)
        head += (mine - head + number % 2 * block) // (2 * block) * block
        head = np.minimum(head, mine)
        # Chunk numbers count along the document.
        sizes = np.empty(2 * size, np.int64)
        sizes[slots[:, 0]], sizes[slots[:, 1]] = head, mine - head
        chunks.append(sizes)
        given += mine
    sizes = np.stack(chunks)
    stops = np.cumsum(sizes, axis=1)
    start, stop = (array.reshape(-1) for array in (stops - sizes, stops))
    cuts = Cuts(np.repeat(documents, 2 * size), start, stop, first + np.tile(pattern, len(documents)))
    # A chunk may be empty.
    keep = cuts.stop > cuts.start
    return Cuts(*(array[keep] for array in cuts))


def _adjust_sum(wanted: np.ndarray, length: int, most: np.ndarray, rest: int) -> np.ndarray:
    """Changes `wanted`, int64 [g], as little as possible into numbers from 0 to `most` [g] with the sum `length`.

    Shard `rest` takes the difference if it can, and the other shards in turn take what is left of it.
    """
    mine = np.clip(wanted, 0, most)
    short = length - int(mine.sum())
    for shard in (rest, *range(len(mine))):
        more = max(-int(mine[shard]), min(short, int(most[shard] - mine[shard])))
        mine[shard] += more
        short -= more
        if not short:
            break
    return mine
