"""The loop on a toy: stopping in any way and going on is as if it had never stopped.

Run as a program it trains the toy in the directory given, which is how signals are tested.
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from param_axes import BY_NAME
from sections import mesh_section, optimizer_of, optimizer_section, section
from tiny_run import lines_of

from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.parallel.mesh import make_mesh
from llmjax.scores.score import Score
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.checkpoint.config import CheckpointConfig
from llmjax.train.loop.loop import TrainingFailed, train
from llmjax.train.loop.run import Run
from llmjax.train.loop.run_position import PartialUpdateRecord, Position
from llmjax.train.loop.stop_request import StopRequest
from llmjax.train.loop.update_totals import mean_metrics
from llmjax.train.steering.batch_schedule import BatchArithmetic, make_batch_schedule
from llmjax.train.steering.controller import ControllerConfig
from llmjax.train.steering.length_schedule import make_length_schedule
from llmjax.train.steering.steering import Steering
from llmjax.train.update.fused import Fused
from llmjax.train.update.in_place import InPlace
from llmjax.workdir.recorder import TIMING, Recorder

ROOT = pathlib.Path(__file__).parents[3]
STEPS, SIZE, LENGTH, NUM_UPDATES = 2, 4, 8, 12
OPTIMIZER = optimizer_of(
    optimizer_section(learning_rate=1e-3, schedule="constant", warmup_updates=0), 1, BY_NAME
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: dict
    opt_state: dict
    update: jax.Array
    rng: jax.Array


def make_state():
    params = {"w": jnp.linspace(-1.0, 1.0, LENGTH)}
    opt_state = {"sum": jnp.zeros(LENGTH), "count": jnp.int32(0), "steps": jnp.int32(0)}
    opt_state |= {"loss": jnp.float32(0), "weight": jnp.float32(0)}
    return State(params, opt_state, jnp.int32(0), jax.random.key(0))


def quadratic(params, x_BT, noise):
    return jnp.sum((x_BT * (params["w"] + noise)[None, :] - 1.0) ** 2)


def micro_step(state, x_BT, inputs):
    """Gradient descent on a quadratic over the micro-batches of an update, with noise drawn for each update."""
    noise = 0.01 * jax.random.normal(jax.random.fold_in(state.rng, state.update), (LENGTH,))
    loss, grads = jax.value_and_grad(quadratic)(state.params, x_BT, noise)
    finite = jnp.isfinite(loss)
    weight = jnp.where(finite, jnp.float32(x_BT.size - 4), 0.0)
    loss, grad = jnp.where(finite, loss, 0.0), jnp.where(finite, grads["w"], 0.0)
    old = state.opt_state
    steps = jnp.where(old["count"] == 0, inputs.steps, old["steps"])
    sums = jnp.stack([old["loss"] + loss, old["weight"] + weight])
    total, count = old["sum"] + grad, old["count"] + 1
    ends, norm = count == steps, jnp.linalg.norm(total) / jnp.maximum(sums[1], 1.0)
    mean = sums[0] / jnp.maximum(sums[1], 1.0)
    applied = ends & (sums[1] > 0) & (mean <= inputs.loss_limit) & (norm <= inputs.norm_limit)
    params = {
        "w": jnp.where(applied, state.params["w"] - inputs.hyper.learning_rate * total, state.params["w"])
    }
    opt_state = {
        "sum": jnp.where(ends, 0.0, total),
        "count": jnp.where(ends, 0, count),
        "steps": steps,
        "loss": jnp.where(ends, 0.0, sums[0]),
        "weight": jnp.where(ends, 0.0, sums[1]),
    }
    metrics = {
        "loss": loss,
        "weight": weight,
        "accuracy": jnp.float32(8.0),
        "square_norm": jnp.sum(grad**2),
        "weight_square": weight**2,
        "dropped": jnp.where(finite, 0.0, 1.0),
        "is_update": ends,
        "applied": applied,
        "mean_loss": jnp.where(ends, mean, 0.0),
        "grad_norm": jnp.where(ends, norm, 0.0),
        "square_total": jnp.where(ends, jnp.sum(total**2), 0.0),
    }
    return State(params, opt_state, state.update + ends, state.rng), metrics


def make_batches(cursor, length=LENGTH):
    """Micro-batches from sequence `cursor` on; sequence i depends on i alone, and on the length asked for."""
    while True:
        rows = np.arange(cursor, cursor + SIZE)
        x_BT = np.sin(rows[:, None] * LENGTH + np.arange(LENGTH)[None, :]) * (length / LENGTH)
        yield jnp.asarray(x_BT, jnp.float32)
        cursor += SIZE


def evaluate(state):
    loss = float(jnp.sum(state.params["w"] ** 2))
    return {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / 3}


def make_steering(num_updates=NUM_UPDATES, points=(), lengths=(), **settings):
    batch = BatchArithmetic(LENGTH, SIZE, STEPS)
    controlled = {
        k: v for k, v in settings.items() if k in {f.name for f in dataclasses.fields(ControllerConfig)}
    }
    stable = {k: v for k, v in settings.items() if k not in controlled}
    return Steering(
        schedule=make_batch_schedule("piecewise" if points else "constant", points, batch),
        lengths=make_length_schedule(lengths, LENGTH),
        optimizer=OPTIMIZER,
        controller=section("controller", **controlled),
        stability=section("stability", **stable),
        tokens_per_update=batch.tokens_per_update,
        num_tokens=num_updates * batch.tokens_per_update,
    )


def make_run(num_updates=NUM_UPDATES, points=(), steering=(), **changes):
    run = Run(
        steering=make_steering(num_updates, points, **dict(steering)),
        engine=InPlace(OPTIMIZER, STEPS),
        micro_batch_size=SIZE,
        seq_len=LENGTH,
        evaluate_every=4,
        step=jax.jit(micro_step, donate_argnums=0),
        make_batches=make_batches,
        evaluate=evaluate,
        score=Score("loss", "held-out loss"),
        restore=None,
        describe_batch=lambda first, count: f"documents {first} to {first + count - 1}",
        write_documents=lambda name, first, count: f"{name}.md",
        save_partial_update=None,
        meta={"config": {"seed": 0}},
    )
    return dataclasses.replace(run, **changes)


KEEP_NEWEST = CheckpointConfig(every=0, keep=1, keep_best=False)


def start_or_resume(workdir, run, every=3, sharding=None, stop=None, **config):
    """What a main program does: from the latest checkpoint, or an update under way, where there is one."""

    def save_partial_update(state, meta):
        with Checkpoints(workdir / "partial_update", KEEP_NEWEST) as stopped:
            stopped.save(meta["cursor"], state, meta)

    with Checkpoints(workdir / "checkpoints", CheckpointConfig(every=every, **config)) as checkpoints:

        def restore(source=checkpoints):
            state, meta = source.restore(jax.eval_shape(make_state))
            return state, Position.from_meta(meta)

        state, position = jax.jit(make_state, out_shardings=sharding)(), Position()
        if checkpoints.latest() is not None:
            state, position = restore()
        if (workdir / "partial_update").is_dir():
            with Checkpoints(workdir / "partial_update", KEEP_NEWEST) as stopped:
                if stopped.latest() > position.cursor:
                    state, position = restore(stopped)
        run = dataclasses.replace(run, restore=restore, save_partial_update=save_partial_update)
        steering = run.steering
        with Recorder(
            workdir,
            resume_update=position.update,
            num_tokens=steering.num_tokens,
            tokens_per_update=steering.tokens_per_update,
        ) as recorder:
            return train(run, state, position, recorder, checkpoints, stop)


def lines(workdir):
    """The record without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines_of(workdir)]


def saved_updates(workdir, folder="checkpoints"):
    return sorted(int(path.name) for path in (workdir / folder).glob("*"))


def assert_same_run(result, workdir, other, other_workdir):
    np.testing.assert_array_equal(np.asarray(result.state.params["w"]), np.asarray(other.state.params["w"]))
    one, two = (dataclasses.replace(x.position, seconds=0.0) for x in (result, other))
    assert one == two
    assert lines(workdir) == lines(other_workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that never stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    return start_or_resume(workdir, make_run()), workdir


def raise_at(call, step=None):
    """The step, but for an error at its `call`-th call, from 0."""
    step, calls = step or make_run().step, iter(range(10**6))

    def failing(state, batch, inputs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return step(state, batch, inputs)

    return failing


def test_the_record_has_a_line_for_every_update_and_evaluation(whole):
    result, workdir = whole
    assert result.position.update == NUM_UPDATES and not result.stopped
    assert result.position.cursor == NUM_UPDATES * STEPS * SIZE
    record = lines_of(workdir)
    updates = [line["update"] for line in record if line["kind"] == "train"]
    assert updates == list(range(1, NUM_UPDATES + 1))
    assert [line["update"] for line in record if line["kind"] == "evaluate"] == [4, 8, 12]
    assert record[-1]["loss"] == result.position.evaluation["loss"]
    first, second = record[0], record[1]
    assert "tokens_per_second" not in first and second["tokens_per_second"] > 0  # the first compiles
    assert first["tokens"] == STEPS * SIZE * LENGTH
    assert first["packing_efficiency"] == (SIZE * LENGTH - 4) / (SIZE * LENGTH)
    assert first["accumulation_steps"] == STEPS and "mfu" not in first and "weight" not in first
    assert first["accuracy"] == 16 / (2 * (SIZE * LENGTH - 4))
    seconds = [line["seconds"] for line in record]
    assert seconds == sorted(seconds)


def test_the_loss_is_the_sum_over_micro_steps_divided_once():
    steps = [
        {"loss": 1.0, "weight": 1.0, "accuracy": 1.0, "pairs": 8.0, "pairs_weight": 2.0, "grad_norm": 0.0},
        {"loss": 90.0, "weight": 9.0, "accuracy": 3.0, "pairs": 2.0, "pairs_weight": 8.0, "grad_norm": 5.0},
    ]
    expected = {"loss": 9.1, "accuracy": 0.4, "pairs": 1.0, "grad_norm": 5.0}
    assert mean_metrics(steps) == expected  # a mean of means would be 5.5


@pytest.mark.parametrize("call", [1, 13, 14, 23])  # in updates 1, 7 (twice) and 12
def test_a_run_that_died_and_resumed_equals_one_that_did_not(whole, tmp_path, call):
    with pytest.raises(KeyboardInterrupt):
        start_or_resume(tmp_path, make_run(step=raise_at(call)))
    result = start_or_resume(tmp_path, make_run())
    assert_same_run(result, tmp_path, *whole)


def test_a_run_that_is_extended_equals_one_planned_so(whole, tmp_path):
    start_or_resume(tmp_path, make_run(num_updates=8))
    result = start_or_resume(tmp_path, make_run())
    assert_same_run(result, tmp_path, *whole)


@pytest.mark.parametrize("update", [6, 7, 8])  # a checkpoint is due, nothing is, an evaluation is
def test_a_run_asked_to_stop_saves_at_once_and_goes_on_as_if_it_had_not(whole, tmp_path, update):
    asked = iter(range(NUM_UPDATES * STEPS))
    step = make_run().step

    def asking(state, batch, inputs):
        if next(asked) == update * STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch, inputs)

    stopped = start_or_resume(tmp_path, make_run(step=asking))
    assert stopped.stopped and stopped.position.update == update == saved_updates(tmp_path)[-1]
    assert stopped.position.evaluation is None  # the time left may be short: evaluated after the resume
    result = start_or_resume(tmp_path, make_run())
    assert not result.stopped
    assert_same_run(result, tmp_path, *whole)


def test_a_finished_run_trains_nothing_but_still_has_its_evaluation(whole):
    result, workdir = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    nothing = make_run(step=None, make_batches=None, evaluate=None)
    again = start_or_resume(workdir, nothing)
    assert again.position.evaluation == result.position.evaluation and again.position.update == NUM_UPDATES
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_metrics_are_fetched_one_update_late(tmp_path, monkeypatch):
    events = []
    run = make_run(num_updates=3, evaluate_every=0)
    step = run.step

    def counting(state, batch, inputs):
        events.append("step")
        return step(state, batch, inputs)

    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: events.append("fetch") or get(x))
    start_or_resume(tmp_path, dataclasses.replace(run, step=counting), every=0)
    two = ["step"] * STEPS
    assert events[:10] == [*two, *two, "fetch", *two, "fetch", "fetch"]


def test_the_newest_the_best_and_the_last_are_kept(tmp_path):
    losses = {4: 3.0, 8: 1.0, 12: 2.0, 16: 2.5, 17: 2.0}
    run = make_run(num_updates=17, evaluate=lambda state: {"loss": losses[int(state.update)]})
    start_or_resume(tmp_path, run, every=3, keep=2)
    assert saved_updates(tmp_path) == [8, 15, 17]  # 8 for its held-out loss, off the cadence of 3


def poison(update, micro):
    def batches(cursor, length):
        for index, x in enumerate(make_batches(cursor)):
            number = cursor // SIZE + index
            yield x * jnp.float32(jnp.nan) if number == (update - 1) * STEPS + micro else x

    return batches


def test_a_micro_batch_that_is_not_finite_is_left_out_counted_and_named(tmp_path):
    written = []
    run = make_run(
        make_batches=poison(update=5, micro=1),
        write_documents=lambda name, first, count: written.append((name, first, count)) or f"{name}.md",
        name_guilty=lambda state, first, count: f"the guilty of {first} to {first + count - 1}",
    )
    result = start_or_resume(tmp_path, run)
    assert result.position.update == NUM_UPDATES
    record = lines_of(tmp_path)
    (event,) = [line for line in record if line["kind"] == "event"]
    assert event["text"] == (
        "micro-step 2 of 2 of update 5 was not finite and left out; the guilty of 36 to 39; documents 36 to 39, "
        "written to update-5-dropped-2.md"
    )
    assert written == [("update-5-dropped-2", 36, 4)]
    by_update = {line["update"]: line for line in record if line["kind"] == "train"}
    assert by_update[5]["dropped"] == 1 and by_update[5]["packing_efficiency"] == (SIZE * LENGTH - 4) / (
        STEPS * SIZE * LENGTH
    )
    assert all(np.isfinite(line["loss"]) for line in by_update.values())
    assert all("dropped" not in line for update, line in by_update.items() if update != 5)


def all_poisoned(cursor, length):
    for x in make_batches(cursor):
        yield x * jnp.float32(jnp.nan) if cursor >= 4 * STEPS * SIZE else x
        cursor += SIZE


def test_a_run_of_nothing_but_failures_stops_and_saves_none_of_it(tmp_path):
    run = make_run(make_batches=all_poisoned, steering={"max_skips": 3})
    message = (
        r"the last 3 updates were all skipped or dropped, .* stability.max_skips=3 .*; "
        r"the last good checkpoint is of update 4 in .*; lower optimizer\.learning_rate"
    )
    with pytest.raises(TrainingFailed, match=message):
        start_or_resume(tmp_path, run, every=1)
    assert saved_updates(tmp_path) == [3, 4]
    train_lines = [line for line in lines_of(tmp_path) if line["kind"] == "train"]
    assert [line["update"] for line in train_lines if line.get("skipped")] == [5, 6, 7]
    assert np.isnan(train_lines[-1]["loss"])
    result = start_or_resume(tmp_path, make_run(), every=1)  # with the data mended
    assert result.position.update == NUM_UPDATES
    assert all(np.isfinite(line["loss"]) for line in lines_of(tmp_path) if line["kind"] == "train")


def test_a_held_out_loss_that_is_not_finite_stops(tmp_path):
    with pytest.raises(TrainingFailed, match=r"held-out loss after update 4 is nan; .* of update 3 "):
        start_or_resume(tmp_path, make_run(evaluate=lambda state: {"loss": float("nan")}))
    assert saved_updates(tmp_path) == [3]


@pytest.mark.parametrize("points", [("0:32", "160:96"), ("0:96",)], ids=str)
@pytest.mark.parametrize("call", range(1, 6))
def test_a_run_stopped_between_any_two_micro_steps_goes_on_as_if_it_had_not(tmp_path, points, call):
    run = make_run(num_updates=10, points=points, evaluate_every=2)
    whole = start_or_resume(tmp_path / "whole", run)
    asked = iter(range(100))

    def asking(state, batch, inputs):
        if next(asked) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return run.step(state, batch, inputs)

    stopped = start_or_resume(tmp_path / "parts", dataclasses.replace(run, step=asking))
    assert stopped.stopped and stopped.position.cursor == (call + 1) * SIZE
    # What is asked for now counts from the next update on: the open one keeps its size.
    resumed = start_or_resume(tmp_path / "parts", run)
    assert_same_run(resumed, tmp_path / "parts", whole, tmp_path / "whole")


def test_a_size_changed_in_mid_update_is_that_of_the_next_update(tmp_path):
    run, asked = make_run(num_updates=6, points=("0:96",)), iter(range(100))

    def asking(state, batch, inputs):
        if next(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run.step(state, batch, inputs)

    stopped = start_or_resume(tmp_path, dataclasses.replace(run, step=asking))
    assert len(stopped.position.partial_update.metrics) == 2 and stopped.position.partial_update.steps == 3
    start_or_resume(tmp_path, make_run(num_updates=6, points=("0:32",)))
    steps = [line["accumulation_steps"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert steps == [3] + [1] * 9  # 6 updates of 64 tokens in all


def test_a_batch_schedule_ends_the_run_at_its_tokens_and_keeps_its_cadences(tmp_path):
    run = make_run(num_updates=6, points=("0:32", "128:160"), evaluate_every=2)
    result = start_or_resume(tmp_path, run, every=0)
    record = lines_of(tmp_path)
    steps = [line["accumulation_steps"] for line in record if line["kind"] == "train"]
    assert steps == [1, 1, 1, 1, 5, 3] and result.position.tokens == 6 * 64  # the last is cut
    assert [line["tokens"] for line in record if line["kind"] == "evaluate"] == [128, 288, 384]


LENGTHS = (
    "0:2",
    "200:8",
    "448:4",
)  # updates of 64 tokens: the first that begins at or after each is the fifth, the eighth


def test_the_length_follows_from_the_tokens_seen_and_batches_go_on_at_the_cursor(tmp_path):
    opened = []

    def batches(cursor, length):
        opened.append((cursor, length))
        return make_batches(cursor, length)

    run = make_run(num_updates=10, steering={"lengths": LENGTHS}, make_batches=batches)
    whole = start_or_resume(tmp_path / "whole", run)
    assert opened == [(0, 2), (4 * STEPS * SIZE, 8), (7 * STEPS * SIZE, 4)]
    record = [line for line in lines_of(tmp_path / "whole") if line["kind"] == "train"]
    assert [line["seq_len"] for line in record] == [2] * 4 + [8] * 3 + [4] * 3
    assert {line["accumulation_steps"] for line in record} == {STEPS}
    # The step compiles while the update before is under way: the time of that one would not be its own.
    untimed = [line["update"] for line in record if "tokens_per_second" not in line]
    assert untimed == [1, 5, 7]  # before update 5 the loop pauses, so that the compile falls into it
    for call in (3, 7, 8, 13, 14):  # in mid-update, before and after each change
        asked = iter(range(100))

        def asking(state, batch, inputs, asked=asked, call=call):
            if next(asked) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return run.step(state, batch, inputs)

        stopped = start_or_resume(tmp_path / f"{call}", dataclasses.replace(run, step=asking))
        assert stopped.stopped and stopped.position.cursor == (call + 1) * SIZE
        resumed = start_or_resume(tmp_path / f"{call}", run)
        assert_same_run(resumed, tmp_path / f"{call}", whole, tmp_path / "whole")


def test_a_rewind_goes_back_to_the_length_of_the_tokens_and_on_with_later_data(tmp_path):
    steering = {"on_spike": "rewind", "warmup_updates": 10, "lengths": ("0:4", "1216:8")}
    opened = []

    def batches(cursor, length):
        opened.append((cursor, length))
        return SPIKE["make_batches"](cursor, length)

    start_or_resume(tmp_path, make_run(**{**SPIKE, "make_batches": batches}, steering=steering), every=6)
    # The spike is in update 21, of length 8 since update 20; it goes back to update 18, before the change.
    assert opened == [(0, 4), (19 * STEPS * SIZE, 8), (21 * STEPS * SIZE, 4), (22 * STEPS * SIZE, 8)]


def scaled_batches(start, stop, factor):
    """Those of `make_batches` with sequences from `start` to `stop` blown up."""

    def batches(cursor, length):
        for x in make_batches(cursor):
            yield x * factor if start <= cursor < stop else x
            cursor += SIZE

    return batches


SPIKE = {"num_updates": 30, "make_batches": scaled_batches(160, 168, 30.0), "evaluate_every": 0}


@pytest.mark.parametrize("on_spike", ["none", "warn", "skip"])
def test_a_spike_is_warned_of_or_skipped(tmp_path, on_spike):
    run = make_run(**SPIKE, steering={"on_spike": on_spike, "warmup_updates": 10})
    start_or_resume(tmp_path, run)
    record = lines_of(tmp_path)
    events = [line for line in record if line["kind"] == "event"]
    updates = [line["update"] for line in events]
    assert updates[:1] == ([] if on_spike == "none" else [21])
    assert on_spike != "skip" or updates == [21]  # trained on, it is felt for a while
    skipped = [line["update"] for line in record if line.get("skipped")]
    assert skipped == ([21] if on_spike == "skip" else [])
    if events:
        assert "of update 21 stands out: loss" in events[0]["text"] and "documents 16" in events[0]["text"]


def test_a_rewind_goes_back_to_the_checkpoint_and_on_after_the_spike(tmp_path):
    run = make_run(**SPIKE, steering={"on_spike": "rewind", "warmup_updates": 10})
    result = start_or_resume(tmp_path, run, every=6)
    assert result.position.update == 30 and result.position.tokens == 30 * 64
    assert result.position.cursor == (30 + 3) * STEPS * SIZE  # updates 19 to 21 were made of later data
    record = lines_of(tmp_path)
    assert [line["update"] for line in record if line["kind"] == "train"] == [*range(1, 31)]
    (event,) = [line for line in record if line["kind"] == "event"]
    assert event["event"] == "rewind" and event["update"] == 18
    assert "back from update 21 to 18, past 24 sequences" in event["text"]
    # and a run that died after it comes to the same
    calls = iter(range(1000))

    def failing(state, batch, inputs):
        if next(calls) == 50:
            raise KeyboardInterrupt
        return run.step(state, batch, inputs)

    with pytest.raises(KeyboardInterrupt):
        start_or_resume(tmp_path / "b", dataclasses.replace(run, step=failing), every=6)
    again = start_or_resume(tmp_path / "b", run, every=6)
    assert_same_run(again, tmp_path / "b", result, tmp_path)


def test_spikes_without_end_stop_the_run(tmp_path):
    batches = scaled_batches(160, 10**9, 30.0)
    run = make_run(
        **{**SPIKE, "make_batches": batches}, steering={"on_spike": "rewind", "warmup_updates": 10}
    )
    with pytest.raises(TrainingFailed, match=r"10 times in a row a spike .* update 18 in"):
        start_or_resume(tmp_path, run, every=6)


def test_a_controller_decides_alike_however_often_the_run_stops(tmp_path):
    steering = {
        "name": "noise_scale",
        "k_min": 2,
        "k_max": 6,
        "half_life": 300,
        "hysteresis": 0.0,
        "batch_per_noise": 300.0,
    }
    run = make_run(num_updates=30, steering=steering, evaluate_every=5)
    whole = start_or_resume(tmp_path / "whole", run)
    steps = [line["accumulation_steps"] for line in lines(tmp_path / "whole") if line["kind"] == "train"]
    assert len(set(steps)) > 1
    calls = iter(range(1000))

    def asking(state, batch, inputs):
        if next(calls) % 9 == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return run.step(state, batch, inputs)

    result = None
    while result is None or result.stopped:
        result = start_or_resume(tmp_path / "parts", dataclasses.replace(run, step=asking))
    assert_same_run(result, tmp_path / "parts", whole, tmp_path / "whole")
    assert all("reason" in line for line in lines(tmp_path / "parts") if line["kind"] == "train")


def test_statistics_are_recorded_at_their_cadence(tmp_path):
    run = make_run(
        num_updates=6, statistics_every=2, statistics=lambda state, batch: {"w": state.params["w"].tolist()}
    )
    start_or_resume(tmp_path, run)
    found = [line for line in lines_of(tmp_path) if line["kind"] == "statistics"]
    assert [line["update"] for line in found] == [2, 4, 6] and len(found[0]["w"]) == LENGTH


def test_mfu_is_recorded_where_the_peak_is_known(tmp_path):
    start_or_resume(tmp_path, make_run(num_updates=2, flops_per_token={LENGTH: 10.0}, peak_flops=100.0))
    line = [line for line in lines_of(tmp_path) if line["kind"] == "train"][1]
    assert line["mfu"] == 10.0 * line["tokens_per_second"] / 100.0


def test_what_does_not_fit_together_is_refused(tmp_path):
    recorder = Recorder(tmp_path, resume_update=0, num_tokens=1, tokens_per_update=1)
    with Checkpoints(tmp_path / "c") as checkpoints, recorder:
        with pytest.raises(ValueError, match=r"the state is at update 0, the position at 3"):
            train(make_run(), make_state(), Position(update=3), recorder, checkpoints)
        step = make_run().step

        def endless(state, batch, inputs):
            state, metrics = step(state, batch, inputs)
            return state, {**metrics, "is_update": jnp.float32(0)}

        with pytest.raises(RuntimeError, match=r"update 1 did not end after 2 micro-steps"):
            train(make_run(step=endless), make_state(), Position(), recorder, checkpoints)
        few = make_run(make_batches=lambda cursor, length: (x for x in [jnp.ones((SIZE, LENGTH))]))
        with pytest.raises(UserError, match=r"the data ended within update 1"):
            train(few, make_state(), Position(), recorder, checkpoints)
        stopped_within = Position(partial_update=PartialUpdateRecord(4, 2 * SIZE, ({"loss": 1.0},)))
        with pytest.raises(
            UserError, match=r"after 1 of 4 micro-steps .* resume with compute.micro_batch_size=8"
        ):
            train(make_run(), make_state(), stopped_within, recorder, checkpoints)
        stopped_within = Position(partial_update=PartialUpdateRecord(4, SIZE, ({"loss": 1.0},)))
        with pytest.raises(UserError, match=r"resume with compute.engine=in_place"):
            train(make_run(engine=Fused(OPTIMIZER, 4)), make_state(), stopped_within, recorder, checkpoints)


def test_batches_are_closed_however_the_loop_ends(tmp_path):
    closed = []

    def batches(cursor, length):
        try:
            yield from make_batches(cursor)
        finally:
            closed.append(cursor)

    start_or_resume(tmp_path, make_run(num_updates=1, make_batches=batches))
    with pytest.raises(KeyboardInterrupt):
        start_or_resume(tmp_path, make_run(make_batches=batches, step=raise_at(3)))
    assert closed == [0, STEPS * SIZE]


def test_a_first_interrupt_asks_and_a_second_interrupts(capfd):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.poll()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "stopping after this step" in capfd.readouterr().err


def start_program(workdir, **variables):
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", __file__, str(workdir)],
        env={**env, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(workdir, count, process):
    deadline = time.monotonic() + 120
    while len(lines_of(workdir)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_program_that_gets_a_signal_saves_and_exits_cleanly(tmp_path):
    process = start_program(tmp_path)
    wait_for_lines(tmp_path, 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.strip() == "stopping after this step and a checkpoint; Ctrl-C interrupts at once"
    ended = json.loads(out.splitlines()[-1])
    is_saved = saved_updates(tmp_path)[-1] == ended["update"] or saved_updates(tmp_path, "partial_update")
    assert ended["stopped"] and is_saved


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_update(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = {"LLMJAX_COORDINATOR": address, "LLMJAX_NUM_PROCESSES": "2"}
    processes = [start_program(tmp_path, LLMJAX_PROCESS_ID=str(index), **common) for index in range(2)]
    wait_for_lines(tmp_path, 5, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    ended = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert ended[0] == ended[1] and ended[0]["stopped"]
    assert "loss" in outputs[0][0] and "loss" not in outputs[1][0]  # the first alone speaks
    assert outputs[0][1] == ""  # and only the second was told to stop
    update = ended[0]["update"]
    # A signal between two micro-steps leaves the update open, and saves it apart.
    assert saved_updates(tmp_path)[-1] == update or saved_updates(tmp_path, "partial_update")
    result = start_or_resume(tmp_path, make_run(num_updates=update + 1))  # goes on in one process
    assert [line["update"] for line in lines(tmp_path) if line["kind"] == "train"] == [*range(1, update + 2)]
    whole = start_or_resume(tmp_path / "whole", make_run(num_updates=update + 1))
    np.testing.assert_allclose(result.state.params["w"], whole.state.params["w"], rtol=1e-5)


def slow_batches(cursor, length):
    """The batches, replicated over all processes, at a pace that leaves time for a signal."""
    sharding = NamedSharding(make_mesh(mesh_section()), PartitionSpec())
    for x in make_batches(cursor):
        time.sleep(0.02)
        yield hosts.make_global(sharding, x.shape, np.arange(SIZE), np.asarray(x))


if __name__ == "__main__":
    hosts.initialize()
    replicated = NamedSharding(make_mesh(mesh_section()), PartitionSpec())
    run = make_run(num_updates=1_000_000, make_batches=slow_batches)
    ended = start_or_resume(pathlib.Path(sys.argv[1]), run, sharding=replicated)
    print(json.dumps({"stopped": ended.stopped, "update": ended.position.update}))
