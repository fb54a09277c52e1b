"""The layout `documents`: assigns the documents of a row to a ring of devices with even work and few hops.

All devices wait at each step of the ring for the slowest, so the work of every step must be even. There are three kinds
of documents:

    split  A document with more work than a device's share is split over a *group* of neighbouring shards, in chunks
           that keep the group even at each step: for two devices a b b a, the zigzag of Llama 3 (2024, arXiv
           2407.21783, section 3.3.2), for larger groups a pattern found by search. Further documents are split, until
           every group has as much work as the group of the largest document.
    whole  Each of the next documents lies whole on one shard, the longest first, where there is the least work.
    short  The shortest documents fill the remaining room, from shard to shard. A short document is cut where a shard is
           full, which costs one hop between neighbours and makes the number of tokens exact.

The size of the groups, from one shard to all, is the one with the lowest cost by a model of the ring. A row of one
document becomes a zigzag over all devices.

The documents also get a new order, which follows the shards. A block of tokens then rarely covers, in this order,
documents of other shards, so that attention skips about as many blocks as it skips in the packed row.

Work is counted in multiples of one half. Floating-point sums of such numbers are exact in any order, so all hosts that
share a row compute the same layout.
"""

from __future__ import annotations

import functools
import heapq

import numpy as np

from llmjax.data.layout import ring_cost
from llmjax.data.layout.split_documents import (
    MAX_PLACED_SINGLY,
    Cuts,
    Row,
    choose_split,
    cut_split,
    split_widths,
)

# The cost of one hop of keys between neighbours: the time in which each query of a device attends to this many keys.
HOP_COST = 96
# Documents are placed whole as long as the remaining tokens, per shard, are at least this many times the length of the
# next document. The rest is then short enough to fill the remaining room of every shard.
SHORT_PER_SHARD = 1.5
# How many short documents are searched for one that ends at the middle of a group.
MIDDLE_CANDIDATES = 64


def assign_documents(lengths: np.ndarray, seq_len: int, shards: int, block: int) -> tuple[Cuts, np.ndarray]:
    """Assigns the documents of a row to shards.

    Args:
      lengths: int [documents], the tokens of each document; the sum is at most seq_len.
      seq_len: T, the positions in the row, a multiple of `shards`.
      shards: n, the number of devices in the ring.
      block: the tokens in a block of attention.

    Returns:
      cuts: the parts of all documents, shard by shard, in their order within each shard.
      ranks: int64 [documents], the rank of each document, from 0, in the new order of the documents. The documents of
        every shard ascend in this order.
    """
    lengths, capacity = np.asarray(lengths, np.int64), seq_len // shards
    # Every shard has at least 8 blocks, or it could not be filled evenly with whole blocks.
    block = min(block, max(1, capacity // 8))
    # L / block query blocks attend to half as many key blocks on average, and the blocks on the diagonal count whole.
    work = lengths * (lengths + block) / 2.0
    row = Row(lengths, work, _room(seq_len - int(lengths.sum()), capacity, shards, block), block)
    best: tuple[Cuts, np.ndarray] | None = None
    least = np.inf
    # The most promising group size comes first, so that most of the others need not be computed.
    for estimate, size in sorted((_optimistic_cost(row, size), size) for size in _divisors(shards)):
        if estimate < least:
            cuts, ranks = _assign_with_groups(row, size)
            cost = _cost(estimate_work(cuts, shards, capacity, block), capacity)
            if cost < least:
                best, least = (cuts, ranks), cost
    assert best is not None  # the first size always has a finite cost
    return best


def _room(padding: int, capacity: int, shards: int, block: int) -> np.ndarray:
    """The tokens of documents that each shard has room for, int64 [shards], beside its part of the padding.

    Padding is shared out in whole blocks. If the blocks do not divide evenly, the last shards get one more. The padding
    that is left, less than a block, goes to the last shard.
    """
    blocks, over = divmod(padding, block)
    room = capacity - (blocks + np.arange(shards)) // shards * block
    room[-1] -= over
    # No shard holds more padding than it has columns; the excess moves to the shard before.
    for shard in range(shards - 1, 0, -1):
        room[shard - 1] += min(0, room[shard])
        room[shard] = max(0, room[shard])
    return room


@functools.lru_cache
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, n + 1) if n % size == 0)


def _optimistic_cost(row: Row, size: int) -> float:
    """An estimate, in pairs of tokens, of the lowest cost that groups of `size` shards can have."""
    shards, capacity = len(row.room), int(row.room[0])
    # Keys travel around the whole ring in one group, and at most size - 1 hops in each direction in several.
    hops = shards - 1 if size == shards else 2 * (size - 1)
    even = max(float(row.work.sum()) / shards, row.work.max(initial=0.0) / size)
    return even + (row.block + HOP_COST * hops) * capacity


def _cost(work: np.ndarray, capacity: int) -> float:
    """The cost of work [n, n], in pairs of tokens: the time of its steps in lockstep, and the time of its hops."""
    return ring_cost.lockstep_time(ring_cost.steps(work)) + HOP_COST * capacity * sum(ring_cost.reach(work))


def estimate_work(cuts: Cuts, shards: int, capacity: int, block: int) -> np.ndarray:
    """Estimates the work of attention: float [n, n], entry [d, e] for the queries of shard d and the keys of shard e.

    Work is counted in pairs of tokens. A pair of blocks counts whole if any query in it may see any key.

    Args:
      cuts: the parts of the documents, in the order in which they lie, shard by shard.
      shards: n, the number of shards.
      capacity: the columns of a shard.
      block: the tokens in a block of attention.
    """
    size = cuts.stop - cuts.start
    # The column of its shard in which each cut begins, and the number of blocks that the cut touches.
    place = np.cumsum(size) - size
    place -= place[np.searchsorted(cuts.shard, cuts.shard)]
    blocks = (place + size - 1) // block - place // block + 1
    # Within a cut, a block attends to all earlier blocks of the cut. Every block of the shard attends to itself, once
    # even if it contains parts of two documents.
    work = np.diag(
        np.bincount(cuts.shard, blocks * (blocks - 1) / 2.0, minlength=shards) - (-capacity // block)
    )
    work = work.reshape(-1)
    # Between the cuts of a document, every block of a later cut attends to every block of an earlier one. Parts are
    # sorted by document and start, so that the pairs of cuts at each lag are found without a loop over documents.
    count = np.bincount(cuts.document)
    parts = np.flatnonzero(count[cuts.document] > 1)
    parts = parts[np.lexsort((cuts.start[parts], cuts.document[parts]))]
    document, shard, blocks = cuts.document[parts], cuts.shard[parts], blocks[parts]
    for lag in range(1, int(count.max(initial=1))):
        earlier = np.flatnonzero(document[lag:] == document[:-lag])
        pairs = shard[earlier + lag] * shards + shard[earlier]
        work += np.bincount(pairs, blocks[earlier + lag] * blocks[earlier], minlength=shards**2)
    return work.reshape(shards, shards) * block**2


def _assign_with_groups(row: Row, size: int) -> tuple[Cuts, np.ndarray]:
    """Assigns the documents with groups of `size` shards. Returns cuts and ranks as `assign_documents` does."""
    lengths, middle = row.lengths, size // 2
    longest_first = np.argsort(-lengths, kind="stable")
    group = choose_split(row, longest_first, size)
    rest = longest_first[group[longest_first] < 0]
    # The longest document of a group is cut last: it can best absorb the tokens by which the others were rounded.
    members = [longest_first[group[longest_first] == g][::-1] for g in range(len(row.room) // size)]
    width, load = split_widths(row, members, size)
    home, count = _place_whole(row, rest, row.room - width, load)
    whole = rest[:count]
    free = row.room - width - np.bincount(home[whole], lengths[whole], minlength=len(width)).astype(np.int64)
    short, width = _place_short(lengths, np.sort(rest[count:]), free, width, size)

    parts = [short, Cuts(whole, np.zeros_like(whole), lengths[whole], home[whole])]
    for first, documents in zip(range(0, len(width), size), members):
        if len(documents):
            # Split documents rank in the middle of their group. On the shards of its first half they therefore lie
            # behind all other documents, on the shards of its second half in front of them.
            before = (row.room - width)[first : first + size]
            before[middle:] = 0
            # A short document that continues from the shard before has a lower rank, so it lies in front of them.
            carried = (short.shard == first + middle) & (short.start > 0)
            before[middle] = (short.stop - short.start)[carried].sum()
            circle = size == len(width)
            parts.append(cut_split(row, documents, width[first : first + size], before, first, circle=circle))
    cuts = Cuts(*(np.concatenate(arrays) for arrays in zip(*parts)))

    # Documents are ranked by the shard on which they begin. Within a shard, whole documents come before short ones. The
    # split documents of a group rank first on the shard in its middle.
    begun = short.start == 0
    home[short.document[begun]] = short.shard[begun]
    kind = np.full(len(lengths), 2)
    kind[whole] = 1
    within = np.arange(len(lengths))
    for g, documents in enumerate(members):
        home[documents], kind[documents] = g * size + middle, 0
        within[documents] = np.arange(len(documents))
    ranks = np.empty(len(lengths), np.int64)
    ranks[np.lexsort((within, kind, home))] = np.arange(len(lengths))
    order = np.lexsort((cuts.start, ranks[cuts.document], cuts.shard))
    return Cuts(*(array[order] for array in cuts)), ranks


def _place_whole(row: Row, rest: np.ndarray, room: np.ndarray, load: np.ndarray) -> tuple[np.ndarray, int]:
    """Places documents whole, each on the shard with the least work.

    Args:
      rest: int64 [k], the documents that are not split, longest first.
      room: int64 [n], the tokens that each shard has room for.
      load: float [n], the work that each shard already has.

    Returns:
      home: int64 [documents], the shard of each document that was placed, -1 for all others.
      count: how many documents of `rest`, counted from the first, were placed.
    """
    home, lengths = np.full(len(row.lengths), -1), row.lengths[rest]
    remaining = np.cumsum(lengths[::-1])[::-1]
    enough = np.flatnonzero(remaining < SHORT_PER_SHARD * len(room) * lengths)
    count = min(int(enough[0]) if len(enough) else len(rest), MAX_PLACED_SINGLY)
    # Short documents will fill the room that is left, with this much work per token. The work of a shard is therefore
    # its own work plus density times its free room, and a document adds only what it has beyond that density.
    density = float(row.work[rest[count:]].sum()) / max(1, int(lengths[count:].sum()))
    # A shard with less free room than the longest short document could make it reach over three shards.
    margin = int(lengths[count]) if count < len(rest) else 0
    free = room.tolist()
    shards = [(float(load[d] + density * free[d]), d) for d in range(len(free))]
    heapq.heapify(shards)
    for number, document in enumerate(rest[:count].tolist()):
        length, full = int(row.lengths[document]), []
        # Shards without room are set aside for this document; a shorter one may still fit.
        while shards and free[shards[0][1]] < length + margin:
            full.append(heapq.heappop(shards))
        if not shards:
            return home, number
        work, shard = shards[0]
        free[shard] -= length
        home[document] = shard
        heapq.heapreplace(shards, (work + float(row.work[document]) - density * length, shard))
        for entry in full:
            heapq.heappush(shards, entry)
    return home, count


def _place_short(
    lengths: np.ndarray, documents: np.ndarray, free: np.ndarray, width: np.ndarray, size: int
) -> tuple[Cuts, np.ndarray]:
    """Fills the free room with documents, one after the other, and cuts a document where a shard is full.

    No document is cut at the middle of a group if that can be avoided, because the split documents lie there. To make
    this possible, the two shards in the middle exchange tokens of split documents.

    Args:
      lengths: int64 [documents], the tokens of every document of the row.
      documents: int64 [k], the short documents; the sum of their lengths is the sum of `free`.
      free: int64 [n], the free room of each shard.
      width: int64 [n], the tokens of split documents on each shard.
      size: the shards in a group.

    Returns the cuts of the short documents, and the changed widths.
    """
    documents, free, width = documents.copy(), free.tolist(), width.copy()
    ends = np.concatenate([[0], np.cumsum(lengths[documents])])
    stops, at = [], 0
    for shard in range(len(free)):
        stop = at + free[shard]
        if size > 1 and shard % size == size // 2 - 1 and width[shard + 1]:
            first = int(np.searchsorted(ends, stop, "right")) - 1
            # Of the next documents, the one that ends nearest to the end of the shard changes places with the first.
            near = lengths[documents[first : first + MIDDLE_CANDIDATES]]
            if len(near):
                best = first + int(np.argmin(np.abs(near - (stop - ends[first]))))
                documents[first], documents[best] = documents[best], documents[first]
                ends[first + 1 : best + 1] += lengths[documents[first]] - lengths[documents[best]]
            # The shard ends with a document if the split documents can give or take the difference.
            edge = min(ends[first : first + 2].tolist(), key=lambda end: abs(end - stop))
            more = stop - edge
            if edge >= at and -width[shard] <= more <= width[shard + 1] and free[shard + 1] + more >= 0:
                width[shard] += more
                width[shard + 1] -= more
                free[shard + 1] += more
                stop = edge
        stops.append(stop)
        at = stop
    # Cuts lie between neighbouring edges: the ends of documents and of shards.
    edges = np.unique(np.concatenate([ends, stops, [0]]))
    start, stop = edges[:-1], edges[1:]
    number = np.searchsorted(ends, start, "right") - 1
    of_shard = np.searchsorted(stops, start, "right")
    return Cuts(documents[number], start - ends[number], stop - ends[number], of_shard), width
