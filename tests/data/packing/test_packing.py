"""Every target exactly once, rows that hold, best-fit decreasing to the row, an order that is a bijection."""

import bisect
import dataclasses
import pickle

import numpy as np
import pytest

from llmjax.data.packing.packing import (
    ARRAYS,
    cached_plan,
    check_corpus,
    hash_integers,
    load_plan,
    permute,
    plan_packing,
    save_plan,
)
from llmjax.errors import UserError

LENGTHS = {
    "heavy_tailed": np.random.default_rng(0).lognormal(4, 1.5, 400).astype(np.int64) + 2,
    "short": np.random.default_rng(1).integers(2, 40, 500),
    "all_equal": np.full(50, 24),
    "one_long": np.array([1000]),
    "awkward_halves": np.random.default_rng(2).integers(30, 38, 300),
    "with_empty_ones": np.array([0, 1, 2, 65, 66, 1, 129, 130, 0]),
}
T = 64


def reference_best_fit_decreasing(sizes, seq_len: int) -> int:
    """Rows that the textbook's loop over pieces needs."""
    rooms = []  # ascending
    for size in sorted(sizes, reverse=True):
        fullest = bisect.bisect_left(rooms, size)
        room = rooms.pop(fullest) if fullest < len(rooms) else seq_len
        bisect.insort(rooms, room - size)
    return len(rooms)


@pytest.fixture(params=sorted(LENGTHS))
def lengths(request):
    return LENGTHS[request.param]


def test_every_target_is_predicted_exactly_once(lengths):
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    predicted = sorted(
        (doc, start + offset + 1)
        for doc, start, length in zip(plan.docs.tolist(), plan.starts.tolist(), plan.lengths.tolist())
        for offset in range(length)
    )
    assert predicted == [(doc, token) for doc, n in enumerate(lengths.tolist()) for token in range(1, n)]


def test_a_document_is_cut_only_if_longer_than_a_row_and_then_at_multiples_of_it(lengths):
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    ends_document = plan.starts + plan.lengths == lengths[plan.docs] - 1
    assert (plan.starts % T == 0).all()
    assert (plan.lengths[~ends_document] == T).all()
    assert (plan.lengths >= 1).all()


def test_rows_hold_their_pieces_and_none_is_empty(lengths):
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    used = np.add.reduceat(plan.lengths, plan.offsets[:-1])
    assert plan.offsets[0] == 0 and plan.offsets[-1] == plan.num_pieces
    assert (np.diff(plan.offsets) > 0).all()
    assert (used <= T).all()


@pytest.mark.parametrize("seq_len", [7, 64, 300])
def test_uses_as_many_rows_as_best_fit_decreasing_piece_by_piece(lengths, seq_len):
    plan = plan_packing(lengths, np.arange(len(lengths)), seq_len, 0)
    assert plan.num_rows == reference_best_fit_decreasing(plan.lengths.tolist(), seq_len)


def test_statistics_count_used_positions_and_attended_keys():
    plan = plan_packing(np.array([5, 3, 9]), np.arange(3), 4, 0)  # pieces of 4, 2, 4, 4
    assert (plan.num_rows, plan.num_pieces, plan.num_documents, plan.num_tokens) == (4, 4, 3, 14)
    assert plan.efficiency == 14 / 16
    assert plan.attended == (10 + 3 + 10 + 10) / 14


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


def test_packs_only_the_chosen_documents():
    plan = plan_packing(LENGTHS["short"], np.array([3, 17, 400]), T, 0)
    assert sorted(plan.docs.tolist()) == [3, 17, 400]


def test_the_seed_decides_which_documents_of_equal_length_meet():
    lengths = LENGTHS["all_equal"]

    def company(seed):
        plan = plan_packing(lengths, np.arange(len(lengths)), T, seed)
        return {frozenset(row.tolist()) for row in np.split(plan.docs, plan.offsets[1:-1])}

    assert company(0) == company(0)
    assert company(0) != company(1)


def test_the_order_within_rows_does_not_follow_length():
    lengths = LENGTHS["short"]
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    rows = np.split(plan.lengths, plan.offsets[1:-1])
    pairs = [row[:2] for row in rows if len(row) > 1 and row[0] != row[1]]
    longer_first = np.mean([first > second for first, second in pairs])
    assert 0.3 < longer_first < 0.7


def test_lengths_beyond_16_bits_are_packed_alike():
    lengths = np.random.default_rng(3).integers(2, 400_000, 300)
    plan = plan_packing(lengths, np.arange(300), 200_000, 0)
    assert plan.num_rows == reference_best_fit_decreasing(plan.lengths.tolist(), 200_000)
    assert plan.num_tokens == (lengths - 1).sum()
    assert (np.add.reduceat(plan.lengths, plan.offsets[:-1]) <= 200_000).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4099])
def test_the_order_of_rows_is_a_permutation_in_every_epoch(size):
    for epoch in range(4):
        assert sorted(permute(np.arange(size), size, 0, epoch).tolist()) == list(range(size))


def test_the_order_differs_between_epochs_and_seeds_and_looks_random():
    size = 2000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in range(3) for epoch in range(3)]
    for number, order in enumerate(orders):
        for other in [np.arange(size), *orders[:number]]:
            assert (order == other).sum() < 10  # 1 is expected
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.1  # 4.5 standard deviations
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1


def test_the_order_can_be_read_in_any_pieces():
    whole = permute(np.arange(1000), 1000, 7, 3)
    assert [int(permute(np.array([i]), 1000, 7, 3)[0]) for i in range(100)] == whole[:100].tolist()


def test_the_order_is_the_same_forever():
    """Values, because a run that is resumed with a later version must see the same data."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [3, 2, 7, 8, 5, 0, 4, 9, 6, 1]
    assert permute(np.array([0, 999_999]), 10**6, 1, 2).tolist() == [561086, 85829]
    assert hash_integers(np.array([0]), 0).tolist() == [0xE220A8397B1DCDAF]  # of splitmix64
    lengths = 2 + np.arange(500) * 7919 % 60
    plan = plan_packing(lengths, np.arange(500), T, 0)
    assert plan.docs[:8].tolist() == [297, 361, 481, 417, 181, 237, 241, 117]


def test_a_plan_survives_the_disk_and_travels_as_its_folder(tmp_path):
    plan = plan_packing(LENGTHS["heavy_tailed"], np.arange(400), T, 0)
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    for restored in (loaded, pickle.loads(pickle.dumps(loaded)), pickle.loads(pickle.dumps(plan))):
        for field in dataclasses.fields(plan):
            if field.name != "folder":
                np.testing.assert_array_equal(getattr(restored, field.name), getattr(plan, field.name))
    assert len(pickle.dumps(loaded)) < 500
    assert not any(getattr(loaded, name).flags.writeable for name in ARRAYS)


def test_an_empty_plan_survives_the_disk(tmp_path):
    save_plan(plan_packing(np.array([1, 1]), np.arange(2), T, 0), tmp_path / "plan")
    assert load_plan(tmp_path / "plan").num_rows == 0


def test_a_cached_plan_is_made_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    lengths, ids = LENGTHS["short"], np.arange(500)
    made = []
    monkeypatch.setattr(
        "llmjax.data.packing.packing.plan_packing", lambda *args: made.append(args) or plan_packing(*args)
    )
    longer = lengths + (ids == 7)
    cases = [(lengths, ids, T, 0), (longer, ids, T, 0), (lengths, ids[1:], T, 0), (lengths, ids, 65, 0)]
    for case in [*cases, (lengths, ids, T, 1)] * 2:
        plan = cached_plan(*case, tmp_path)
        assert plan.num_tokens == (case[0][case[1]] - 1).sum()
        assert (plan.seq_len, plan.folder) == (case[2], str(tmp_path / f"plan-{plan.fingerprint}"))
    assert len(made) == len(list(tmp_path.iterdir())) == 5


def test_of_two_writers_of_a_plan_the_first_wins_and_nothing_is_left_behind(tmp_path):
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
