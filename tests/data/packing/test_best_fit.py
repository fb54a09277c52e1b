"""Best-fit decreasing on the histogram of lengths uses as many rows as the textbook's loop over single pieces."""

import bisect

import numpy as np
import pytest

from llmjax.data.packing.best_fit import pack_best_fit
from llmjax.data.packing.make_plan import plan_packing
from tests.data.packing.document_lengths import EVERY_CORPUS


def reference_best_fit_decreasing(sizes, seq_len: int) -> int:
    """The number of rows that the textbook's loop over single pieces needs."""
    # The room in each row, ascending.
    rooms = []
    for size in sorted(sizes, reverse=True):
        fullest = bisect.bisect_left(rooms, size)
        room = rooms.pop(fullest) if fullest < len(rooms) else seq_len
        bisect.insort(rooms, room - size)
    return len(rooms)


@EVERY_CORPUS
@pytest.mark.parametrize("seq_len", [7, 64, 300])
def test_uses_as_many_rows_as_best_fit_decreasing_piece_by_piece(lengths, seq_len):
    plan = plan_packing(lengths, np.arange(len(lengths)), seq_len, 0)
    assert plan.num_rows == reference_best_fit_decreasing(plan.lengths.tolist(), seq_len)


def test_lengths_beyond_16_bits_are_packed_as_well():
    lengths = np.random.default_rng(3).integers(2, 400_000, 300)
    plan = plan_packing(lengths, np.arange(300), 200_000, 0)
    assert plan.num_rows == reference_best_fit_decreasing(plan.lengths.tolist(), 200_000)
    assert plan.num_tokens == (lengths - 1).sum()
    assert (np.add.reduceat(plan.lengths, plan.offsets[:-1]) <= 200_000).all()


def test_rows_are_numbered_without_gaps_and_none_is_overfull():
    lengths = np.random.default_rng(4).integers(1, 65, 1000)
    rows, num_rows = pack_best_fit(lengths, 64)
    assert set(rows.tolist()) == set(range(num_rows))
    assert np.bincount(rows, lengths).max() <= 64
