"""Packing of examples that have two streams: rows of T target positions and S source positions, without cutting.

A document and its source share a row, and neither is split over rows: a translation could not be learned if its source
were in another row. This is bin packing in two dimensions. A greedy algorithm places the largest documents first, each
into the row in which it leaves the least room in the stream of which it takes the larger share, among a limited number
of candidate rows.
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from llmjax.errors import UserError

# The version of the algorithm. It is part of a plan's fingerprint: raising it discards cached plans.
FORMAT = 2
# How many different amounts of room are searched for each document. A larger number finds fuller rows and takes longer.
LOOK_AHEAD = 64


@dataclasses.dataclass(frozen=True, eq=False)
class SourceStream:
    """The second stream of tokens, which is packed together with the first.

    lengths     int [documents], the source tokens of every document of the store
    row_length  S, the source positions in a row
    """

    lengths: np.ndarray
    row_length: int

    def check(self, doc_ids: np.ndarray, predictions: np.ndarray, seq_len: int) -> None:
        """Raises UserError if a document does not fit into one row.

        Args:
          doc_ids: int [n], the documents to pack.
          predictions: int [n], the target positions of each of them.
          seq_len: T, the target positions in a row.
        """
        for key, found, limit in (
            ("data.seq_len", predictions, seq_len),
            ("data.source_len", self.lengths[doc_ids], self.row_length),
        ):
            too_long = int(np.count_nonzero(found > limit))
            if too_long:
                raise UserError(
                    f"{key}={limit} is too short for {too_long:,} of {len(doc_ids):,} documents, whose two texts "
                    f"are never cut; the longest has {int(found.max()):,} tokens: raise {key} or leave them out"
                )


def pack_two_streams(
    lengths: np.ndarray, source_lengths: np.ndarray, seq_len: int, source_len: int
) -> tuple[np.ndarray, int]:
    """Packs n documents into rows that have room for both their streams.

    Args:
      lengths: int [n], the target positions of each document, at most seq_len.
      source_lengths: int [n], the source positions of each document, at most source_len.
      seq_len: T, the target positions in a row.
      source_len: S, the source positions in a row.

    Returns:
      rows: int64 [n], the row of each document.
      num_rows: the number of rows.
    """
    needs = np.stack([np.asarray(lengths, np.int64), np.asarray(source_lengths, np.int64)])
    # The largest document first. Its size is the larger of length / T and source length / S, the shares of a row that
    # it takes; both are multiplied by T * S here, to compare integers. The sort is stable.
    shares = needs * np.array([[source_len], [seq_len]])
    order = np.argsort(-shares.max(axis=0), kind="stable")
    # The stream of which each document takes the larger share: 0 for targets, 1 for sources.
    tight = shares.argmax(axis=0)[order].tolist()
    # The least that any of the documents still to come needs. A row with less room is full.
    least = np.minimum.accumulate(needs[:, order][:, ::-1], axis=1)[:, ::-1]
    least = np.append(least[:, 1:], [[seq_len + 1], [source_len + 1]], axis=1).T.tolist()
    rows, num_rows = np.empty(len(order), np.int64), 0
    by_room = _OpenRows(0), _OpenRows(1)
    for i, need, stream, still in zip(order.tolist(), needs[:, order].T.tolist(), tight, least):
        # Best fit in the stream that is tight for this document.
        found = by_room[stream].find(need)
        if found is None:
            found, num_rows = (num_rows, [seq_len, source_len]), num_rows + 1
        else:
            for index in by_room:
                index.remove(*found)
        row, room = found
        rows[i] = row
        room = [room[0] - need[0], room[1] - need[1]]
        if room[0] >= still[0] and room[1] >= still[1]:
            for index in by_room:
                index.add(row, room)
    return rows, num_rows


class _OpenRows:
    """Rows that are not full, by their room in one stream, 0 or 1.

    The room of a row is [target positions, source positions].
    """

    def __init__(self, stream: int):
        self._own, self._other = stream, 1 - stream
        # The different amounts of room, ascending.
        self._amounts: list[int] = []
        # Room in this stream -> (room in the other stream, row) of each row that has it, ascending.
        self._rows: dict[int, list[tuple[int, int]]] = {}

    def add(self, row: int, room: list[int]) -> None:
        own = room[self._own]
        if own not in self._rows:
            bisect.insort(self._amounts, own)
            self._rows[own] = []
        bisect.insort(self._rows[own], (room[self._other], row))

    def remove(self, row: int, room: list[int]) -> None:
        own = room[self._own]
        candidates = self._rows[own]
        del candidates[bisect.bisect_left(candidates, (room[self._other], row))]
        if not candidates:
            del self._rows[own]
            del self._amounts[bisect.bisect_left(self._amounts, own)]

    def find(self, need: list[int]) -> tuple[int, list[int]] | None:
        """The row with the least room that suffices, and its room; None if none is among those that are looked at."""
        first = bisect.bisect_left(self._amounts, need[self._own])
        for own in self._amounts[first : first + LOOK_AHEAD]:
            candidates = self._rows[own]
            # -1 sorts before every row number.
            at = bisect.bisect_left(candidates, (need[self._other], -1))
            if at < len(candidates):
                other, row = candidates[at]
                return row, [own, other] if self._own == 0 else [other, own]
        return None
