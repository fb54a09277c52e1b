"""Between two updates: the work is saved before what may fail, and what can be gone back to is good."""

import dataclasses
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import (
    STEPS,
    assert_same_run,
    lines,
    make_batches,
    make_run,
    make_state,
    quadratic,
    raise_at,
    saved_updates,
    start_or_resume,
)

from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.loop.stop_request import StopRequest
from llmjax.train.loop.upkeep import FollowUpFailed, TrainingFailed


def loss(state, x_BT):
    return float(quadratic(state.params, x_BT, 0.0))


def ruined_in(update, run=None):
    """The step, but update `update` leaves parameters behind that are not finite, though its own loss is."""
    step = (run or make_run()).step

    def ruining(state, batch, order):
        state, metrics = step(state, batch, order)
        if int(state.update) == update and metrics["is_update"]:
            state = dataclasses.replace(state, params={"w": state.params["w"] * jnp.nan})
        return state, metrics

    return ruining


def facts(workdir):
    """Of each checkpoint, whether a finite loss was seen and whether its parameters are finite."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        found = {}
        for update in checkpoints.updates():
            state, meta = checkpoints.restore(jax.eval_shape(make_state), update)
            found[update] = meta["finite_loss"], bool(np.isfinite(state.params["w"]).all())
        return found, checkpoints.latest(), checkpoints.best()


NOTHING_HELD_OUT = {"evaluate": None, "loss": loss, "begin": make_state}
DIVERGED = {  # changes of the run, cadence, what is kept, the last good update
    "updates left out to the end": ({}, {"every": 1}, 7),
    "only one checkpoint is kept": ({}, {"every": 1, "keep": 1}, 7),
    "the last update does the damage": ({"num_updates": 8}, {"every": 1}, 7),
    "nothing held out": (NOTHING_HELD_OUT, {"every": 1}, 7),
    "nothing held out, in the last update": ({**NOTHING_HELD_OUT, "num_updates": 8}, {"every": 1}, 7),
    "saved at the end only": ({"evaluate_every": 4}, {"every": 0}, 4),
    "saved at the end only, nothing held out": (NOTHING_HELD_OUT, {"every": 0}, 0),
    "an evaluation is not finite": ({"evaluate_every": 8}, {"every": 3}, 6),
}


@pytest.mark.parametrize("name", DIVERGED)
def test_a_diverged_run_fails_and_keeps_a_good_checkpoint_from_before(name, tmp_path):
    changes, config, good = DIVERGED[name]
    run = make_run(**{"num_updates": 10, "evaluate_every": 0, **changes}, steering={"max_skips": 9})
    run = dataclasses.replace(run, step=ruined_in(8, run))
    with pytest.raises(TrainingFailed, match=rf"; the last good checkpoint is of update {good} in "):
        start_or_resume(tmp_path, run, **config)
    found, latest, best = facts(tmp_path)
    assert latest == good == max(found) and best in (None, *range(good + 1))
    assert all(finite for _, finite in found.values()) and found[good][0] is True
    # With the cause removed the same command goes on from there.
    again = make_run(**{"num_updates": 10, "evaluate_every": 0, **changes})
    assert start_or_resume(tmp_path, again, **config).position.update == again.steering.num_tokens // 64
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path) if line["kind"] == "train")


@pytest.mark.parametrize("every", [1, 0])
def test_updates_left_out_at_the_end_fail_with_the_state_before_them_saved(every, tmp_path):
    def batches(cursor, length):
        for x in make_batches(cursor):
            yield x * jnp.nan if cursor >= 7 * STEPS * 4 else x
            cursor += 4

    run = make_run(num_updates=9, make_batches=batches, evaluate=None, loss=loss)
    with pytest.raises(
        TrainingFailed, match=r"the last 2 updates were not finite and left out; .* update 7 in"
    ):
        start_or_resume(tmp_path, run, every=every)
    assert max(saved_updates(tmp_path)) == 7
    mended = dataclasses.replace(run, make_batches=make_batches)
    result = start_or_resume(tmp_path, mended, every=every)
    whole = start_or_resume(tmp_path / "whole", mended, every=every)
    assert_same_run(result, tmp_path, whole, tmp_path / "whole")


def test_a_stop_after_updates_left_out_saves_the_last_that_was_not(tmp_path):
    run = make_run(evaluate=None, loss=loss, begin=make_state, steering={"max_skips": 9})
    ruining, calls = ruined_in(5, run), iter(range(100))

    def asking(state, batch, order):
        if next(calls) == 7 * STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ruining(state, batch, order)

    result = start_or_resume(tmp_path, dataclasses.replace(run, step=asking), keep=1)
    assert result.stopped
    found, latest, _ = facts(tmp_path)
    assert found == {3: (True, True), 5: (False, False)} and latest == 3  # the good one outlives keep=1
    assert start_or_resume(tmp_path, run).position.update == 12
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path) if line["kind"] == "train")


def fail(*args):
    raise MemoryError("cannot allocate 9 TB")


FOLLOWS = {
    "evaluation": {"evaluate": fail},
    "sampling": {"sample": fail},
    "looking at its layers": {"statistics_every": 2, "statistics": fail},
}


@pytest.mark.parametrize("num_updates", [12, 4])
@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("what", FOLLOWS)
def test_training_is_saved_before_what_follows_it_and_the_next_start_makes_up_for_it(
    what, keep_best, num_updates, tmp_path
):
    sampled = []
    # Update 4, where the first evaluation is due, is off the cadence of checkpoints.
    looking = {"statistics_every": 4, "statistics": lambda state, batch: {"x": float(jnp.sum(batch))}}
    run = make_run(num_updates, sample=lambda state, update: sampled.append(update), **looking)
    config = {"every": 100, "keep_best": keep_best}
    whole = start_or_resume(tmp_path / "whole", run, **config)
    sampled.clear()
    broken = dataclasses.replace(run, **{**FOLLOWS[what], "statistics_every": 4})
    with pytest.raises(FollowUpFailed, match=rf"{what} failed \(MemoryError: cannot .* makes up for it"):
        start_or_resume(tmp_path / "parts", broken, **config)
    assert saved_updates(tmp_path / "parts") == [4]
    trained = []
    step = lambda *args: trained.append(1) or run.step(*args)  # noqa: E731
    result = start_or_resume(tmp_path / "parts", dataclasses.replace(run, step=step), **config)
    assert len(trained) == (num_updates - 4) * STEPS and sampled == [*range(4, num_updates + 1, 4)]
    assert_same_run(result, tmp_path / "parts", whole, tmp_path / "whole")


@pytest.mark.parametrize("event", ["evaluate", "sample", "statistics"])
def test_a_death_after_the_save_owes_what_follows(event, tmp_path):
    def die(*args):
        raise SystemExit

    looking = {"statistics_every": 4, "statistics": lambda state, batch: {"x": float(jnp.sum(batch))}}
    run = make_run(**looking)
    whole = start_or_resume(tmp_path / "whole", run)
    with pytest.raises(SystemExit):
        start_or_resume(tmp_path / "parts", dataclasses.replace(run, **{event: die}))
    result = start_or_resume(tmp_path / "parts", run)
    assert_same_run(result, tmp_path / "parts", whole, tmp_path / "whole")


def test_a_stop_is_heeded_within_an_evaluation_which_the_next_start_makes(tmp_path):
    run = make_run()
    whole = start_or_resume(tmp_path / "whole", run)
    with StopRequest() as stop:

        def evaluate(state):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in stop.watch(range(3)):
                pytest.fail("the evaluation went on")

        monkey = dataclasses.replace(run, evaluate=evaluate)
        result = start_or_resume(tmp_path / "parts", monkey, stop=stop)
    assert result.stopped and result.position.update == 4 and result.position.evaluation is None
    assert saved_updates(tmp_path / "parts") == [3, 4]
    assert_same_run(start_or_resume(tmp_path / "parts", run), tmp_path / "parts", whole, tmp_path / "whole")


def test_a_run_of_no_updates_leaves_a_checkpoint_and_its_evaluation(tmp_path):
    result = start_or_resume(tmp_path, make_run(num_updates=0))
    assert saved_updates(tmp_path) == [0] and result.position.evaluation is not None
    again = start_or_resume(tmp_path, make_run(num_updates=0, evaluate=fail))
    assert again.position.evaluation == result.position.evaluation
    whole = start_or_resume(tmp_path / "whole", make_run())
    result = start_or_resume(tmp_path, make_run())
    np.testing.assert_array_equal(result.state.params["w"], whole.state.params["w"])


def test_a_disk_that_takes_no_documents_does_not_end_a_run(tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    def batches(cursor, length):
        for x in make_batches(cursor):
            yield x * jnp.nan if cursor == 16 else x
            cursor += 4

    start_or_resume(tmp_path, make_run(make_batches=batches, write_documents=full))
    (event,) = [line for line in lines(tmp_path) if line["kind"] == "event"]
    assert event["text"].endswith("documents 16 to 19, not written (No space left on device)")


def test_a_run_that_is_killed_anywhere_keeps_a_good_checkpoint(tmp_path):
    """With keep=1 a checkpoint of which nothing is known yet does not replace a good one."""
    with pytest.raises(KeyboardInterrupt):
        start_or_resume(tmp_path, make_run(step=raise_at(6 * STEPS), evaluate=None), keep=1)
    assert facts(tmp_path)[0] == {3: (True, True), 6: (None, True)}
