"""Packing of examples that have two streams: rows of T target positions and S source positions, nothing cut.

A document and its source always share a row, and neither is split over rows: a translation whose source ended in
another row could not be learned. That is bin packing in two dimensions, done greedily, the largest documents first;
each goes into the row that it leaves the least room in, among a bounded number of rows looked at.
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from llmjax.errors import UserError

FORMAT = 1  # of the algorithm; part of a plan's fingerprint
# Different amounts of room looked at for a document: more find a better row, and take longer.
LOOK_AHEAD = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The second stream of a packing.

    lengths     int [documents], source tokens of every document of the store
    row_length  S, source positions in a row
    """

    lengths: np.ndarray
    row_length: int

    def check(self, doc_ids: np.ndarray, predictions: np.ndarray, seq_len: int) -> None:
        """Raises UserError where a document of `predictions` [n] target positions does not fit into one row."""
        for key, found, limit in (
            ("data.seq_len", predictions, seq_len),
            ("data.source_len", self.lengths[doc_ids], self.row_length),
        ):
            too_long = int(np.count_nonzero(found > limit))
            if too_long:
                raise UserError(
                    f"{key}={limit} is too short for {too_long:,} of {len(doc_ids):,} documents, whose sources and "
                    f"targets are never cut; the longest has {int(found.max()):,} tokens: raise {key} or leave them out"
                )


def pack_two_streams(
    lengths: np.ndarray, source_lengths: np.ndarray, seq_len: int, source_len: int
) -> tuple[np.ndarray, int]:
    """The row of each document, int64 [n], and the number of rows.

    Args:
      lengths: int [n], target positions of each document, at most seq_len.
      source_lengths: int [n], source positions of each document, at most source_len.
      seq_len: T, target positions in a row.
      source_len: S, source positions in a row.
    """
    # The larger share of a row that a document takes, of the two, decides its turn; the sort is stable.
    share = np.maximum(
        np.asarray(lengths, np.int64) * source_len, np.asarray(source_lengths, np.int64) * seq_len
    )
    order = np.argsort(-share, kind="stable")
    rows = np.empty(len(order), np.int64)
    num_rows = 0
    rooms: list[int] = []  # the different amounts of target room among open rows, ascending
    open_rows: dict[int, list[tuple[int, int]]] = {}  # target room -> (source room, row), ascending

    def put(room: int, source_room: int, row: int) -> None:
        if room <= 0:
            return
        if room not in open_rows:
            bisect.insort(rooms, room)
            open_rows[room] = []
        bisect.insort(open_rows[room], (source_room, row))

    for i, length, source_length in zip(
        order.tolist(), lengths[order].tolist(), source_lengths[order].tolist()
    ):
        first = bisect.bisect_left(rooms, length)
        for room in rooms[first : first + LOOK_AHEAD]:
            candidates = open_rows[room]
            at = bisect.bisect_left(candidates, (source_length, -1))
            if at < len(candidates):
                source_room, row = candidates.pop(at)
                if not candidates:
                    del open_rows[room]
                    rooms.remove(room)
                break
        else:
            room, source_room, row = seq_len, source_len, num_rows
            num_rows += 1
        rows[i] = row
        put(room - length, source_room - source_length, row)
    return rows, num_rows
