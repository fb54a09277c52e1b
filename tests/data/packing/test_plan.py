"""The statistics of a plan are exact, a plan is saved and loaded without change, and small corpora are refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from llmjax.data.packing.make_plan import plan_packing
from llmjax.data.packing.plan import ARRAYS, check_corpus, load_plan, save_plan
from llmjax.errors import UserError
from tests.data.packing.document_lengths import EVERY_CORPUS, LENGTHS, T


def test_statistics_count_used_positions_and_attended_keys():
    plan = plan_packing(np.array([5, 3, 9]), np.arange(3), 4, 0)  # pieces of 4, 2, 4, 4
    assert (plan.num_rows, plan.num_pieces, plan.num_documents, plan.num_tokens) == (4, 4, 3, 14)
    assert plan.efficiency == 14 / 16
    assert plan.attended == (10 + 3 + 10 + 10) / 14


def test_long_documents_are_cut_at_their_borders_and_every_prediction_is_kept():
    borders = {1: [3, 7, 9, 20], 2: [], 3: [10]}
    plan = plan_packing(
        np.array([4, 27, 12, 11]), np.arange(4), 10, 0, borders=lambda doc: np.array(borders[doc])
    )
    pieces = sorted(zip(plan.docs.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    # No border lies within a row of the place from which 10 tokens are taken.
    cuts = {0: [(0, 3)], 1: [(0, 9), (9, 10), (19, 7)], 2: [(0, 10), (10, 1)], 3: [(0, 10)]}
    assert pieces == [(doc, *piece) for doc, of_doc in cuts.items() for piece in of_doc]
    other = plan_packing(np.array([4, 27, 12, 11]), np.arange(4), 10, 0, borders=lambda doc: np.array([9]))
    assert plan.num_tokens == 50 and plan.fingerprint != other.fingerprint


@EVERY_CORPUS
@pytest.mark.parametrize("length", [1, 8, 16, 64])
def test_attended_keys_of_cut_rows_are_those_of_every_piece_within_them(lengths, length):
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    keys = 0
    for row in range(plan.num_rows):
        sizes = plan.lengths[plan.offsets[row] : plan.offsets[row + 1]]
        owner = np.pad(np.repeat(np.arange(len(sizes)), sizes), (0, T - sizes.sum()), constant_values=-1)
        for piece in owner.reshape(-1, length):
            keys += sum(
                n * (n + 1) // 2 for n in np.unique(piece[piece >= 0], return_counts=True)[1].tolist()
            )
    assert plan.attended_in(length) == keys / plan.num_tokens
    assert plan.attended_in(T) == plan.attended


def test_a_plan_is_loaded_as_it_was_saved_and_pickled_as_its_folder(tmp_path):
    plan = plan_packing(LENGTHS["heavy_tailed"], np.arange(400), T, 0)
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    for restored in (loaded, pickle.loads(pickle.dumps(loaded)), pickle.loads(pickle.dumps(plan))):
        for field in dataclasses.fields(plan):
            if field.name != "folder":
                np.testing.assert_array_equal(getattr(restored, field.name), getattr(plan, field.name))
    assert len(pickle.dumps(loaded)) < 500
    assert not any(getattr(loaded, name).flags.writeable for name in ARRAYS)


def test_an_empty_plan_can_be_saved_and_loaded(tmp_path):
    save_plan(plan_packing(np.array([1, 1]), np.arange(2), T, 0), tmp_path / "plan")
    assert load_plan(tmp_path / "plan").num_rows == 0


def test_of_two_writers_of_a_plan_the_first_wins_and_no_other_folder_is_left(tmp_path):
    plan = plan_packing(LENGTHS["short"], np.arange(500), T, 0)
    save_plan(plan, tmp_path / "plan")
    save_plan(plan, tmp_path / "plan")
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_corpus_that_is_too_small_is_refused_in_one_sentence():
    some, none = (plan_packing(np.full(2, n), np.arange(2), T, 0) for n in (65, 1))
    check_corpus(some, some, sequences_per_update=2, held_out_fraction=0.1)
    check_corpus(some, none, sequences_per_update=2, held_out_fraction=0.0)
    for train, held_out, needed, fraction, words in [
        (some, some, 3, 0.1, "2 documents .* 2 sequences of data.seq_len=64, fewer than the 3 of one"),
        (none, some, 1, 0.9, "held_out_fraction=0.9 holds out all 2 documents"),
        (some, none, 1, 0.1, "held_out_fraction=0.1 holds out none of the 2 documents"),
        (none, none, 1, 0.1, "no document of more than one token"),
    ]:
        with pytest.raises(UserError, match=words):
            check_corpus(train, held_out, sequences_per_update=needed, held_out_fraction=fraction)
