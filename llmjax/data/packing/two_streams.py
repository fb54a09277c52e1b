"""Packing of examples that have two streams: rows of T target positions and S source positions, without cutting.

A document and its source share a row, and neither is split over rows: a translation could not be learned if its source
were in another row. This is bin packing in two dimensions. A greedy algorithm places the largest documents first, each
into the row in which it leaves the least room, among a limited number of candidate rows.
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from llmjax.errors import UserError

# The version of the algorithm. It is part of a plan's fingerprint: raising it discards cached plans.
FORMAT = 1
# How many different amounts of target room are searched for each document. A larger number finds fuller rows and takes
# longer.
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
                    f"{key}={limit} is too short for {too_long:,} of {len(doc_ids):,} documents, whose sources and "
                    f"targets are never cut; the longest has {int(found.max()):,} tokens: raise {key} or leave them out"
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
    # The largest document first. Its size is the larger of length / T and source length / S, the shares of a row that
    # it takes; both are multiplied by T * S here, to compare integers. The sort is stable.
    share = np.maximum(
        np.asarray(lengths, np.int64) * source_len, np.asarray(source_lengths, np.int64) * seq_len
    )
    order = np.argsort(-share, kind="stable")
    rows = np.empty(len(order), np.int64)
    num_rows = 0
    # The different amounts of target room among the open rows, ascending.
    rooms: list[int] = []
    # Target room -> (source room, row) of each open row that has it, ascending.
    open_rows: dict[int, list[tuple[int, int]]] = {}

    def add_open_row(room: int, source_room: int, row: int) -> None:
        # Every document has a target, so a row without target room is full.
        if room <= 0:
            return
        if room not in open_rows:
            bisect.insort(rooms, room)
            open_rows[room] = []
        bisect.insort(open_rows[room], (source_room, row))

    for i, length, source_length in zip(
        order.tolist(), lengths[order].tolist(), source_lengths[order].tolist()
    ):
        # Best fit: the smallest target room that suffices, and for it the smallest source room that suffices.
        first = bisect.bisect_left(rooms, length)
        for room in rooms[first : first + LOOK_AHEAD]:
            candidates = open_rows[room]
            # -1 sorts before every row number.
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
        add_open_row(room - length, source_room - source_length, row)
    return rows, num_rows
