"""Rows cut into shorter ones hold the same tokens and targets, each piece a row of its own."""

import numpy as np
import pytest

from llmjax.data.packing.shorten_rows import cut_rows
from llmjax.data.pipeline import make_batches
from tests.data.test_pipeline import FIELDS, T, assert_same, join, make_source, take


def test_a_row_is_cut_as_one_would_by_hand():
    row = {
        "tokens": np.array([[11, 12, 13, 21, 22, 23, 24, 31, 32, 33, 0, 0]]),
        "targets": np.array([[12, 13, 14, 22, 23, 24, 25, 32, 33, 34, 0, 0]]),
        "weights": np.array([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]], np.float32),
        "segments": np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0]]),
        "positions": np.array([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 0]]),
        "index": np.array([5], np.int32),
    }
    cut = cut_rows(row, 4)
    assert cut["tokens"].tolist() == [[11, 12, 13, 21], [22, 23, 24, 31], [32, 33, 0, 0]]
    assert cut["targets"].tolist() == [[12, 13, 14, 22], [23, 24, 25, 32], [33, 34, 0, 0]]
    assert cut["weights"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert cut["segments"].tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 0, 0]]
    assert cut["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 0, 0]]
    assert cut["index"].tolist() == [15, 16, 17]


@pytest.mark.parametrize("length", [1, 2, 8, 16])
def test_every_piece_is_a_row_like_any_other(length):
    source = make_source()
    whole = source.read(np.arange(2 * source.plan.num_rows))
    cut = cut_rows(whole, length)
    assert cut.keys() == FIELDS
    for name in ("tokens", "targets", "weights"):  # the same targets, each once, in the same order
        np.testing.assert_array_equal(cut[name].reshape(-1, T), whole[name])
    assert {name: array.dtype for name, array in cut.items()} == {n: a.dtype for n, a in whole.items()}
    assert len(set(cut["index"].tolist())) == len(cut["index"]) == len(whole["index"]) * T // length
    documents = whole["segments"].reshape(-1, length)
    for segments, positions, before in zip(cut["segments"], cut["positions"], documents):
        number, position = 0, 0
        for i in range(length):
            if before[i] == 0:
                assert (segments[i], positions[i]) == (0, 0)
                continue
            goes_on = i > 0 and before[i] == before[i - 1]
            number, position = (number, position + 1) if goes_on else (number + 1, 0)
            assert (segments[i], positions[i]) == (number, position)


def test_whole_rows_stay_and_odd_pieces_are_refused():
    rows = make_source().read(np.arange(3))
    assert cut_rows(rows, T) is rows
    with pytest.raises(ValueError, match="Rows of 32 cannot be cut into rows of 5"):
        cut_rows(rows, 5)


def test_the_index_of_a_piece_depends_on_row_and_piece_alone_and_wraps():
    source = make_source()
    alone = cut_rows(source.read(np.array([7])), 8)
    among = cut_rows(source.read(np.array([3, 7, 2**31 - 1])), 8)
    for name, array in among.items():
        np.testing.assert_array_equal(array[4:8], alone[name])
    assert among["index"][8:].tolist() == [2**31 - 4, 2**31 - 3, 2**31 - 2, 2**31 - 1]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_make_the_cut_rows_of_the_batch_in_order(hosts):
    source = make_source()
    per_host = 8 // hosts
    parts = [
        take(
            make_batches(
                source,
                start=16,
                batch_size=8,
                length=8,
                local_rows=np.arange(per_host) + host * per_host,
            ),
            3,
        )
        for host in range(hosts)
    ]
    together = join([part[number] for number in range(3) for part in parts])
    assert_same(together, cut_rows(source.read(np.arange(16, 40)), 8))
