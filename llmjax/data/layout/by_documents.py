"""The layout `documents`: spreads the documents of a row over a ring of devices, balanced at each step, with few hops.

A short document lies whole on one device, where all its keys are. One with more work than a device's share is split
over a group of neighbours, in chunks that keep the group in balance at each step of the ring: over two devices a b b a,
the zigzag of Llama 3 (2024, arXiv 2407.21783, section 3.3.2), over more of them what a search found to be better. Since
all devices wait at each step for the slowest, the next documents are split too, each over a group of its own, until
every group has as much to do as that of the largest. The other documents are placed whole, longest first, each where
the least work is; and the shortest are poured into the room that is left, from device to device, and cut where one is
full. That makes the number of tokens exact, for one hop between neighbours. How many devices a group has, from one to
all, is what is cheapest by a model of the ring. A row of one document is a zigzag over all devices.

The documents get an order of their own, that of the devices: hardly a block then spans, in this order, a document that
lies elsewhere, so that attention by blocks skips about as much as it would in a row that is left as it is.

Work is counted in whole and half numbers, whose sums are exact, so that all hosts of a row come to the same layout.
"""

from __future__ import annotations

import functools
import heapq
from typing import NamedTuple

import numpy as np

from llmjax.data.layout import ring_cost

# The cost of a hop, in keys that each query of a device could attend to in that time.
HOP = 96
# How many of the longest documents are placed one by one. Shorter ones are poured.
ONE_BY_ONE = 512
# About how many of the longest poured document fill the room that a device has for poured ones.
POURED = 1.5
# Group size -> which device has each chunk of a document, every device having two: a search over all orders found less
# waiting at the steps of the ring than in a zigzag. tools/bench_layout.py counts what they do.
PATTERNS = {
    3: (0, 1, 2, 1, 2, 0),
    4: (2, 3, 1, 0, 1, 0, 2, 3),
    5: (3, 1, 2, 0, 4, 4, 2, 0, 1, 3),
    6: (3, 1, 5, 2, 4, 0, 0, 2, 4, 3, 5, 1),
    8: (3, 2, 1, 0, 4, 6, 5, 7, 5, 4, 7, 6, 2, 3, 1, 0),
}


class Cuts(NamedTuple):
    """Parts of documents, tokens start to stop of each, and the shard on which they lie: int64 [cuts] each."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    shard: np.ndarray


class Row(NamedTuple):
    """What is to be laid out.

    lengths  int64 [documents], tokens
    work     float [documents], pairs of tokens, as many as blocks of `block` tokens make
    room     int64 [n], tokens of documents that each shard takes; they are as many as there are
    block    tokens of which chunks are multiples where they can be
    """

    lengths: np.ndarray
    work: np.ndarray
    room: np.ndarray
    block: int


def spread(lengths: np.ndarray, seq_len: int, shards: int, block: int) -> tuple[Cuts, np.ndarray]:
    """The cuts of documents of these lengths [documents], in the order in which they lie, shard by shard; and the
    place of each document in the order of documents in which those of a shard ascend, int64 [documents], from 0."""
    lengths, capacity = np.asarray(lengths, np.int64), seq_len // shards
    block = min(block, max(1, capacity // 8))
    work = lengths * (lengths + block) / 2.0
    row = Row(lengths, work, _room(seq_len - int(lengths.sum()), capacity, shards, block), block)
    best: tuple[Cuts, np.ndarray] | None = None
    least = np.inf
    for bound, size in sorted((_bound(row, size), size) for size in _divisors(shards)):
        if bound < least:
            cuts, places = _arrange(row, size)
            cost = _cost(work_of(cuts, shards, capacity, block), capacity)
            if cost < least:
                best, least = (cuts, places), cost
    assert best is not None  # the first size always has a finite cost
    return best


def _room(padding: int, capacity: int, shards: int, block: int) -> np.ndarray:
    """The tokens that each shard has room for, int64 [shards], when padding is shared out.

    Padding is shared out in whole blocks, one more to the last shards, and its rest goes to the last shard.
    """
    blocks, over = divmod(padding, block)
    room = capacity - (blocks + np.arange(shards)) // shards * block
    room[-1] -= over
    for shard in range(shards - 1, 0, -1):  # no shard holds more padding than tokens
        room[shard - 1] += min(0, room[shard])
        room[shard] = max(0, room[shard])
    return room


@functools.lru_cache
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, n + 1) if n % size == 0)


def _bound(row: Row, size: int) -> float:
    """About the least that groups of `size` can cost."""
    shards, capacity = len(row.room), int(row.room[0])
    hops = shards - 1 if size == shards else 2 * (size - 1)
    even = max(float(row.work.sum()) / shards, row.work.max(initial=0.0) / size)
    return even + (row.block + HOP * hops) * capacity


def _cost(work: np.ndarray, capacity: int) -> float:
    """The time that work [n, n] takes and what its hops cost, in pairs of tokens."""
    return ring_cost.lockstep_time(ring_cost.steps(work)) + HOP * capacity * sum(ring_cost.reach(work))


def work_of(cuts: Cuts, shards: int, capacity: int, block: int) -> np.ndarray:
    """float [n, n]: pairs of tokens in the pairs of blocks that hold queries of shard d and keys of shard e that they
    see. `cuts` are in the order in which they lie."""
    size = cuts.stop - cuts.start
    place = np.cumsum(size) - size
    place -= place[np.searchsorted(cuts.shard, cuts.shard)]
    blocks = (place + size - 1) // block - place // block + 1
    # Two documents share the block in which the one ends and the other begins: it meets itself once.
    work = np.diag(
        np.bincount(cuts.shard, blocks * (blocks - 1) / 2.0, minlength=shards) - (-capacity // block)
    )
    work = work.reshape(-1)
    count = np.bincount(cuts.document)
    parts = np.flatnonzero(count[cuts.document] > 1)
    parts = parts[np.lexsort((cuts.start[parts], cuts.document[parts]))]
    document, shard, blocks = cuts.document[parts], cuts.shard[parts], blocks[parts]
    for lag in range(1, int(count.max(initial=1))):
        earlier = np.flatnonzero(document[lag:] == document[:-lag])
        pairs = shard[earlier + lag] * shards + shard[earlier]
        work += np.bincount(pairs, blocks[earlier + lag] * blocks[earlier], minlength=shards**2)
    return work.reshape(shards, shards) * block**2


def _arrange(row: Row, size: int) -> tuple[Cuts, np.ndarray]:
    """`spread` for groups of `size` shards."""
    lengths, middle = row.lengths, size // 2
    longest_first = np.argsort(-lengths, kind="stable")
    group = _choose_split(row, longest_first, size)
    rest = longest_first[group[longest_first] < 0]
    # Of a group's documents the longest comes last: it has the last word about where the others were rounded.
    members = [longest_first[group[longest_first] == g][::-1] for g in range(len(row.room) // size)]
    width, load = _share_out(row, members, size)
    home, count = _place_whole(row, rest, row.room - width, load)
    whole = rest[:count]
    free = row.room - width - np.bincount(home[whole], lengths[whole], minlength=len(width)).astype(np.int64)
    poured, width = _pour(lengths, np.sort(rest[count:]), free, width, size)

    parts = [poured, Cuts(whole, np.zeros_like(whole), lengths[whole], home[whole])]
    for first, documents in zip(range(0, len(width), size), members):
        if len(documents):
            # In the first half of a group they lie at the end of the shards, behind all else, then in front.
            before = (row.room - width)[first : first + size]
            before[middle:] = 0
            carried = (poured.shard == first + middle) & (poured.start > 0)
            before[middle] = (poured.stop - poured.start)[carried].sum()
            circle = size == len(width)
            parts.append(_cut(row, documents, width[first : first + size], before, first, circle=circle))
    cuts = Cuts(*(np.concatenate(arrays) for arrays in zip(*parts)))

    # Shard by shard, the poured ones last; those that are split, in the middle of their group, first.
    begun = poured.start == 0
    home[poured.document[begun]] = poured.shard[begun]
    kind = np.full(len(lengths), 2)
    kind[whole] = 1
    within = np.arange(len(lengths))
    for g, documents in enumerate(members):
        home[documents], kind[documents] = g * size + middle, 0
        within[documents] = np.arange(len(documents))
    places = np.empty(len(lengths), np.int64)
    places[np.lexsort((within, kind, home))] = np.arange(len(lengths))
    order = np.lexsort((cuts.start, places[cuts.document], cuts.shard))
    return Cuts(*(array[order] for array in cuts)), places


def _choose_split(row: Row, longest_first: np.ndarray, size: int) -> np.ndarray:
    """int64 [documents], the group over which each is split, or -1."""
    group = np.full(len(row.lengths), -1)
    if size == 1:
        return group
    room = row.room.reshape(-1, size).sum(axis=1).tolist()
    share = float(row.work.sum()) / len(row.room)
    level = float(row.work.max(initial=0.0))  # the work of the group that has most
    work, tokens = [0.0] * len(room), [0] * len(room)
    for document in longest_first[:ONE_BY_ONE].tolist():
        length, cost = int(row.lengths[document]), float(row.work[document])
        # A whole document is work for one device, beside what split ones make it do.
        must = cost > max(share - level / size, 0.15 * share) or 2 * length > row.room[0]
        if not must and length < 2 * size * row.block:
            break
        full = 1.0 if must else 0.9  # short documents are wanted beside, to make the tokens exact
        open_groups = [(done, g) for g, done in enumerate(work) if tokens[g] + length <= full * room[g]]
        if open_groups:
            done, g = min(open_groups)
            if must or done + cost <= 1.02 * level:
                group[document] = g
                work[g] += cost
                tokens[g] += length
                level = max(level, work[g])
    return group


def _share_out(row: Row, members: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of split documents on each shard, int64 [n], and the work that they make within it, float [n].

    All shards of a group have the same number of whole blocks; the rest lies on the shards in the middle.
    """
    width, load = np.zeros(len(row.room), np.int64), np.zeros(len(row.room))
    middle_last = (np.arange(size) + size // 2 + 1) % size
    for first, documents in zip(range(0, len(width), size), members):
        lengths, room = row.lengths[documents], row.room[first : first + size]
        total = int(lengths.sum())
        mine = np.minimum(total // size, room) // row.block * row.block
        left = total - int(mine.sum())
        for shard in middle_last[:-1]:
            if left >= row.block and room[shard] - mine[shard] >= row.block:
                mine[shard] += row.block
                left -= row.block
        for shard in middle_last[::-1]:
            more = min(left, int(room[shard] - mine[shard]))
            mine[shard] += more
            left -= more
        width[first : first + size] = mine
        square = float((lengths.astype(float) ** 2).sum())
        load[first : first + size] = (mine / max(1, total)) ** 2 * square / 2
    return width, load


def _place_whole(row: Row, rest: np.ndarray, room: np.ndarray, load: np.ndarray) -> tuple[np.ndarray, int]:
    """The shard of each document that stays whole, int64 [documents], and how many of `rest`, longest first, do.

    Each goes where the least work is. Because what is left of the room will be poured full, a document counts with the
    work that it makes beyond that of its tokens in poured ones.
    """
    home, lengths = np.full(len(row.lengths), -1), row.lengths[rest]
    remaining = np.cumsum(lengths[::-1])[::-1]
    enough = np.flatnonzero(remaining < POURED * len(room) * lengths)
    count = min(int(enough[0]) if len(enough) else len(rest), ONE_BY_ONE)
    density = float(row.work[rest[count:]].sum()) / max(1, int(lengths[count:].sum()))
    # Where less is left than the longest to be poured, that one would reach over more than two shards.
    margin = int(lengths[count]) if count < len(rest) else 0
    free = room.tolist()
    shards = [(float(load[d] + density * free[d]), d) for d in range(len(free))]
    heapq.heapify(shards)
    for number, document in enumerate(rest[:count].tolist()):
        length, full = int(row.lengths[document]), []
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


def _pour(
    lengths: np.ndarray, documents: np.ndarray, free: np.ndarray, width: np.ndarray, size: int
) -> tuple[Cuts, np.ndarray]:
    """The cuts of `documents`, which fill the `free` room [n] from shard to shard, and the widths that follow.

    In the middle of a group none is cut, so that the split documents there adjoin whole ones: their widths give way.
    """
    documents, free, width = documents.copy(), free.tolist(), width.copy()
    ends = np.concatenate([[0], np.cumsum(lengths[documents])])
    stops, at = [], 0
    for shard in range(len(free)):
        stop = at + free[shard]
        if size > 1 and shard % size == size // 2 - 1 and width[shard + 1]:
            first = int(np.searchsorted(ends, stop, "right")) - 1
            near = lengths[documents[first : first + 64]]
            if len(near):  # of the next documents the one that fits best comes next
                best = first + int(np.argmin(np.abs(near - (stop - ends[first]))))
                documents[first], documents[best] = documents[best], documents[first]
                ends[first + 1 : best + 1] += lengths[documents[first]] - lengths[documents[best]]
            edge = min(ends[first : first + 2].tolist(), key=lambda end: abs(end - stop))
            more = stop - edge
            if edge >= at and -width[shard] <= more <= width[shard + 1] and free[shard + 1] + more >= 0:
                width[shard] += more
                width[shard + 1] -= more
                free[shard + 1] += more
                stop = edge
        stops.append(stop)
        at = stop
    edges = np.unique(np.concatenate([ends, stops, [0]]))
    start, stop = edges[:-1], edges[1:]
    number = np.searchsorted(ends, start, "right") - 1
    of_shard = np.searchsorted(stops, start, "right")
    return Cuts(documents[number], start - ends[number], stop - ends[number], of_shard), width


def _cut(
    row: Row, documents: np.ndarray, width: np.ndarray, before: np.ndarray, first: int, *, circle: bool
) -> Cuts:
    """The cuts of `documents`, split over the shards from `first` on, each of which takes `width` [g] tokens of them.

    Each shard takes its part of each document, in two chunks that begin and end with a block of its own, `before` [g]
    being the tokens in front of the first. Only one shard, each time the next, takes what does not go into blocks.
    `circle`: the group is the whole ring, in which a zigzag is in balance.
    """
    size, block = len(width), row.block
    zigzag = (*range(size), *reversed(range(size)))
    pattern = np.array(zigzag if circle else PATTERNS.get(size, zigzag))
    slots = np.argsort(pattern, kind="stable").reshape(size, 2)
    total, done, given, chunks = int(row.lengths[documents].sum()), 0, np.zeros(size, np.int64), []
    for number, length in enumerate(row.lengths[documents].tolist()):
        done += length
        fill = -(before + given) % block  # what the shard's last block has room for
        mine = width - given
        if done < total:
            want = width * done // total - given
            # Rounded up on some shards and down on others, so that the sum is about right.
            blocks = (want - fill + np.arange(size) * block // size) // block
            mine = _fit(fill + blocks * block, length, mine, (size // 2 + number) % size)
        head = np.minimum(fill, mine)
        head += (mine - head + number % 2 * block) // (2 * block) * block
        head = np.minimum(head, mine)
        sizes = np.empty(2 * size, np.int64)
        sizes[slots[:, 0]], sizes[slots[:, 1]] = head, mine - head
        chunks.append(sizes)
        given += mine
    sizes = np.stack(chunks)
    stops = np.cumsum(sizes, axis=1)
    start, stop = (array.reshape(-1) for array in (stops - sizes, stops))
    cuts = Cuts(np.repeat(documents, 2 * size), start, stop, first + np.tile(pattern, len(documents)))
    keep = cuts.stop > cuts.start
    return Cuts(*(array[keep] for array in cuts))


def _fit(wanted: np.ndarray, length: int, most: np.ndarray, rest: int) -> np.ndarray:
    """int64 [g], about `wanted`, between 0 and `most`, of sum `length`; shard `rest` takes the difference if it can."""
    mine = np.clip(wanted, 0, most)
    short = length - int(mine.sum())
    for shard in (rest, *range(len(mine))):
        more = max(-int(mine[shard]), min(short, int(most[shard] - mine[shard])))
        mine[shard] += more
        short -= more
        if not short:
            break
    return mine
