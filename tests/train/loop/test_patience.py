"""Early stopping: a run ends after some evaluations without a better score, and counts on where it was interrupted."""

import dataclasses

import pytest
from test_loop import assert_same_run, lines, make_run, raise_at, saved_updates, start_or_resume

from llmjax.scores.score import Score
from llmjax.train.loop.run_position import Position

# The score at each update. After update 4 none is better until update 10.
SCORES = {2: 0.5, 4: 0.4, 6: 0.45, 8: 0.4, 10: 0.1, 12: 0.2}
NAMES = {False: Score("loss", "held-out loss"), True: Score("loss", "agreement", higher_is_better=True)}


def patient(patience, higher=False, **changes):
    """A run of 12 updates whose scores are `SCORES`, or their opposites where the highest is the best."""
    sign = -1.0 if higher else 1.0
    evaluate = lambda state: {"loss": sign * SCORES[int(state.update)]}  # noqa: E731
    return make_run(patience=patience, evaluate=evaluate, evaluate_every=2, score=NAMES[higher], **changes)


@pytest.mark.parametrize("higher", NAMES)
@pytest.mark.parametrize("keep_best", [True, False])
def test_a_run_ends_when_it_has_waited_long_enough_and_is_saved(tmp_path, higher, keep_best):
    result = start_or_resume(tmp_path, patient(2, higher), every=5, keep_best=keep_best)
    assert result.position.update == 8 and not result.stopped and result.position.waited == 2
    assert max(saved_updates(tmp_path)) == 8 and (4 in saved_updates(tmp_path)) == keep_best
    (event,) = (line for line in lines(tmp_path) if line["kind"] == "event")
    label = NAMES[higher].label
    assert (
        f"the {label} has not become better in 2 evaluations in a row, so that train.patience=2 ends"
        in event["text"]
    )
    assert ("; the best checkpoint is of update 4" in event["text"]) == keep_best


def test_a_larger_patience_goes_on_and_a_finished_run_stays_finished(tmp_path):
    start_or_resume(tmp_path, patient(2))
    again = start_or_resume(tmp_path, patient(2))
    assert again.position.update == 8
    result = start_or_resume(tmp_path, patient(3))
    assert result.position.update == 12 and result.position.waited == 1 and result.position.best_rank == 0.1
    assert start_or_resume(tmp_path / "never", patient(0)).position.update == 12


@pytest.mark.parametrize("call", [9, 11, 13, 14])  # in updates 5 to 8
def test_a_run_that_died_and_resumed_stops_where_one_does_that_did_not(tmp_path, call):
    whole = start_or_resume(tmp_path / "whole", patient(2))
    with pytest.raises(KeyboardInterrupt):
        start_or_resume(tmp_path / "cut", dataclasses.replace(patient(2), step=raise_at(call)), every=1)
    result = start_or_resume(tmp_path / "cut", patient(2))
    assert_same_run(result, tmp_path / "cut", whole, tmp_path / "whole")


def test_a_checkpoint_of_an_older_version_has_waited_for_nothing():
    meta = Position(update=3).to_meta()
    old = {name: value for name, value in meta.items() if name not in ("best_rank", "waited")}
    assert Position.from_meta(old) == Position(update=3)
    for name, value in (("waited", -1), ("best_rank", "low")):
        with pytest.raises(ValueError, match=name):
            Position.from_meta(meta | {name: value})
