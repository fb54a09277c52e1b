"""Best-fit decreasing packing of one stream: the longest piece first, each into the fullest row that has room for it.

Packing whole pieces instead of cutting documents at row borders keeps their context (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830). Only the number of pieces of each length matters, so the
algorithm works on the histogram of lengths. Its Python loop takes time in proportion to the number of different
lengths, not to the number of documents.
"""

from __future__ import annotations

import bisect
import collections

import numpy as np

from llmjax.data.packing.order import stable_argsort


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Packs pieces of these lengths, int64 [pieces], each from 1 to seq_len, into rows of seq_len positions.

    Pieces of equal length take their places in the order in which they are given.

    Returns:
      rows: int64 [pieces], the row of each piece.
      num_rows: the number of rows.
    """
    # An ascending order of the room that a piece leaves in an empty row puts the longest piece first.
    longest_first = stable_argsort(seq_len - lengths)
    runs, num_rows = _best_fit_decreasing(np.bincount(lengths, minlength=seq_len + 1))
    rows = np.empty(len(lengths), np.int64)
    rows[longest_first] = _rows_of_runs(runs)
    return rows, num_rows


def _best_fit_decreasing(histogram: np.ndarray) -> tuple[np.ndarray, int]:
    """Packs histogram[length] pieces of each length, int64 [seq_len + 1], exactly as a loop over single pieces would.

    Rows with the same room are equally good, and they are filled alike: each takes `copies` pieces of the current
    length. Filling one row before the next is right, because a row that took a piece has less room than before and is
    thus the best fit for the next piece of the same length, as long as that piece fits.

    Returns:
      runs: int64 [runs, 3] of (first row, number of rows, copies). The pieces, longest first, fill the runs in order.
      num_rows: the number of rows.
    """
    seq_len = len(histogram) - 1
    present = np.flatnonzero(histogram)
    if not len(present):
        return np.zeros((0, 3), np.int64), 0
    shortest = int(present[0])
    # The different amounts of room among the rows that are still open, ascending.
    rooms: list[int] = []
    # Amount of room -> ranges (first, stop) of the open rows that have it.
    open_rows: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)

    def add_open_rows(room: int, first: int, stop: int) -> None:
        # A row too full for the shortest piece is closed for good.
        if first < stop and room >= shortest:
            if not open_rows[room]:
                bisect.insort(rooms, room)
            open_rows[room].append((first, stop))

    runs, num_rows = [], 0
    for length in reversed(present.tolist()):
        left = int(histogram[length])
        while left:
            # The best fit is the smallest room that is large enough.
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                # No open row has room: open as many empty rows as the remaining pieces of this length fill.
                more = -(-left // (seq_len // length))
                add_open_rows(seq_len, num_rows, num_rows + more)
                num_rows += more
            room = rooms[at]
            first, stop = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[at]
            # One run holds rows with equally many copies; a last row with fewer pieces is a run of its own.
            copies = room // length
            if left < copies:
                copies = left
            filled = first + min(stop - first, left // copies)
            runs.append((first, filled - first, copies))
            left -= (filled - first) * copies
            add_open_rows(room - copies * length, first, filled)
            add_open_rows(room, filled, stop)
    return np.array(runs, np.int64), num_rows


def _rows_of_runs(runs: np.ndarray) -> np.ndarray:
    """The row of each piece, int64 [pieces], longest piece first, from runs [runs, 3] (`_best_fit_decreasing`)."""
    first, count, copies = runs.T
    # np.cumsum(count) - count is where a run begins in the list of rows, so each run counts up from its first row.
    rows = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
    return np.repeat(rows, np.repeat(copies, count))
