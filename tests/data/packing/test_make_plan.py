"""Every target is predicted exactly once, rows are never overfull, and plans follow from lengths and seed alone."""

import numpy as np

from llmjax.data.packing.make_plan import cached_plan, plan_packing
from tests.data.packing.document_lengths import EVERY_CORPUS, LENGTHS, T


@EVERY_CORPUS
def test_every_target_is_predicted_exactly_once(lengths):
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    predicted = sorted(
        (doc, start + offset + 1)
        for doc, start, length in zip(plan.docs.tolist(), plan.starts.tolist(), plan.lengths.tolist())
        for offset in range(length)
    )
    assert predicted == [(doc, token) for doc, n in enumerate(lengths.tolist()) for token in range(1, n)]


@EVERY_CORPUS
def test_a_document_is_cut_only_if_longer_than_a_row_and_then_at_multiples_of_it(lengths):
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    ends_document = plan.starts + plan.lengths == lengths[plan.docs] - 1
    assert (plan.starts % T == 0).all()
    assert (plan.lengths[~ends_document] == T).all()
    assert (plan.lengths >= 1).all()


@EVERY_CORPUS
def test_no_row_is_overfull_or_empty(lengths):
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    used = np.add.reduceat(plan.lengths, plan.offsets[:-1])
    assert plan.offsets[0] == 0 and plan.offsets[-1] == plan.num_pieces
    assert (np.diff(plan.offsets) > 0).all()
    assert (used <= T).all()


def test_packs_only_the_chosen_documents():
    plan = plan_packing(LENGTHS["short"], np.array([3, 17, 400]), T, 0)
    assert sorted(plan.docs.tolist()) == [3, 17, 400]


def test_the_seed_decides_which_documents_of_equal_length_share_a_row():
    lengths = LENGTHS["all_equal"]

    def rows(seed):
        plan = plan_packing(lengths, np.arange(len(lengths)), T, seed)
        return {frozenset(row.tolist()) for row in np.split(plan.docs, plan.offsets[1:-1])}

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_the_order_within_rows_does_not_follow_length():
    lengths = LENGTHS["short"]
    plan = plan_packing(lengths, np.arange(len(lengths)), T, 0)
    rows = np.split(plan.lengths, plan.offsets[1:-1])
    pairs = [row[:2] for row in rows if len(row) > 1 and row[0] != row[1]]
    longer_first = np.mean([first > second for first, second in pairs])
    assert 0.3 < longer_first < 0.7


def test_a_cached_plan_is_made_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    lengths, ids = LENGTHS["short"], np.arange(500)
    made = []
    monkeypatch.setattr(
        "llmjax.data.packing.make_plan.plan_packing", lambda *args: made.append(args) or plan_packing(*args)
    )
    longer = lengths + (ids == 7)
    cases = [(lengths, ids, T, 0), (longer, ids, T, 0), (lengths, ids[1:], T, 0), (lengths, ids, 65, 0)]
    for case in [*cases, (lengths, ids, T, 1)] * 2:
        plan = cached_plan(*case, tmp_path)
        assert plan.num_tokens == (case[0][case[1]] - 1).sum()
        assert (plan.seq_len, plan.folder) == (case[2], str(tmp_path / f"plan-{plan.fingerprint}"))
    assert len(made) == len(list(tmp_path.iterdir())) == 5


def test_plans_never_change():
    """The values are written down because a run that a later version resumes must see the same data."""
    lengths = 2 + np.arange(500) * 7919 % 60
    plan = plan_packing(lengths, np.arange(500), T, 0)
    assert plan.docs[:8].tolist() == [297, 361, 481, 417, 181, 237, 241, 117]
