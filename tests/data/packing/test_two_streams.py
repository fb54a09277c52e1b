"""Packing of two streams: every document once, in one row with its source, rows never overfull, and few of them."""

import numpy as np
import pytest

from llmjax.data.packing.make_plan import plan_packing
from llmjax.data.packing.plan import load_plan, save_plan
from llmjax.data.packing.two_streams import SourceStream, pack_two_streams
from llmjax.errors import UserError


def drawn(seed, n=400, T=64, S=48):
    rng = np.random.default_rng(seed)
    return rng.integers(1, T + 1, n), rng.integers(0, S + 1, n)


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_overfull_in_either_stream(seed):
    lengths, sources = drawn(seed)
    rows, num_rows = pack_two_streams(lengths, sources, 64, 48)
    assert np.bincount(rows, lengths).max() <= 64 and np.bincount(rows, sources, num_rows).max() <= 48
    assert set(rows) == set(range(num_rows))


# Whether both streams are alike, have nothing to do with each other, or one of them fills the rows.
KINDS = {
    "alike": lambda lengths, rng: np.clip(lengths + rng.integers(-2, 3, len(lengths)), 1, None),
    "independent": lambda lengths, rng: rng.integers(3, 20, len(lengths)),
    "longer": lambda lengths, rng: lengths + rng.integers(1, 20, len(lengths)),
    "shorter": lambda lengths, rng: np.clip(lengths - rng.integers(1, 20, len(lengths)), 0, None),
    "of one length": lambda lengths, rng: np.full(len(lengths), 64),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_at_most_a_tenth_more_than_must_be(kind, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 20, 8000)
    sources = KINDS[kind](lengths, rng)
    rows, num_rows = pack_two_streams(lengths, sources, 512, 512)
    assert np.bincount(rows, lengths).max() <= 512 and np.bincount(rows, sources).max() <= 512
    assert num_rows <= 1.1 * max(lengths.sum() / 512, sources.sum() / 512)


def test_a_plan_is_a_function_of_lengths_and_seed_and_is_saved_whole(tmp_path):
    lengths, sources = drawn(0)
    source = SourceStream(sources, 48)
    plan, again = (plan_packing(lengths + 1, np.arange(400), 64, 7, source) for _ in range(2))
    assert plan.fingerprint == again.fingerprint and (plan.docs == again.docs).all()
    others = (
        plan_packing(lengths + 1, np.arange(400), 64, 8, source),
        plan_packing(lengths + 1, np.arange(400), 64, 7, SourceStream(sources, 49)),
        plan_packing(lengths + 1, np.arange(400), 64, 7, SourceStream(sources[::-1], 48)),
    )
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 4
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert loaded.source_len == 48
    np.testing.assert_array_equal(loaded.source_lengths, sources[plan.docs])
    np.testing.assert_array_equal(loaded.docs, plan.docs)


@pytest.mark.parametrize("T, S, key", [(63, 48, "data.seq_len=63"), (64, 47, "data.source_len=47")])
def test_a_document_that_fits_into_no_row_is_refused_and_counted(T, S, key):
    lengths, sources = np.array([65, 9]), np.array([3, 48])
    with pytest.raises(UserError, match=f"{key} is too short for 1 of 2 documents"):
        plan_packing(lengths, np.arange(2), T, 0, SourceStream(sources, S))
