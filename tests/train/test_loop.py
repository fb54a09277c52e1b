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

from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.train.checkpoint import CheckpointConfig, Checkpoints
from llmjax.train.loop import NonFiniteLoss, Position, Run, mean_metrics, train
from llmjax.train.metrics import TIMING, Recorder, read_metrics
from llmjax.train.signals import StopRequest

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SIZE, LENGTH, NUM_UPDATES = 2, 4, 8, 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: dict
    opt_state: dict
    update: jax.Array
    rng: jax.Array


def make_state():
    params = {"w": jnp.linspace(-1.0, 1.0, LENGTH)}
    return State(params, {"sum": jnp.zeros(LENGTH), "count": jnp.int32(0)}, jnp.int32(0), jax.random.key(0))


def quadratic(params, x_BT, noise):
    return jnp.sum((x_BT * (params["w"] + noise)[None, :] - 1.0) ** 2)


def micro_step(state, x_BT):
    """Gradient descent on a quadratic over STEPS micro-batches, with noise drawn for each update."""
    noise = 0.01 * jax.random.normal(jax.random.fold_in(state.rng, state.update), (LENGTH,))
    loss, grads = jax.value_and_grad(quadratic)(state.params, x_BT, noise)
    total = state.opt_state["sum"] + grads["w"]
    count = state.opt_state["count"] + 1
    ends = count == STEPS
    params = {"w": jnp.where(ends, state.params["w"] - 1e-3 * total, state.params["w"])}
    opt_state = {"sum": jnp.where(ends, 0.0, total), "count": jnp.where(ends, 0, count)}
    metrics = {
        "loss": loss,
        "weight": jnp.float32(x_BT.size - 4),
        "accuracy": jnp.float32(8.0),
        "grad_norm": jnp.linalg.norm(total),
        "learning_rate": jnp.float32(1e-3),
        "is_update": ends.astype(jnp.float32),
    }
    return State(params, opt_state, state.update + ends, state.rng), metrics


def make_batches(cursor):
    """Micro-batches from sequence `cursor` on; sequence i depends on i alone."""
    while True:
        rows = np.arange(cursor, cursor + SIZE)
        yield jnp.asarray(np.sin(rows[:, None] * LENGTH + np.arange(LENGTH)[None, :]), jnp.float32)
        cursor += SIZE


def evaluate(state):
    loss = float(jnp.sum(state.params["w"] ** 2))
    return {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / 3}


def make_run(**changes):
    run = Run(
        num_updates=NUM_UPDATES,
        accumulation_steps=STEPS,
        micro_batch_size=SIZE,
        seq_len=LENGTH,
        evaluate_every=4,
        step=jax.jit(micro_step, donate_argnums=0),
        make_batches=make_batches,
        evaluate=evaluate,
        describe_batch=lambda first, count: f"documents {first} to {first + count - 1}",
        meta={"config": {"seed": 0}},
    )
    return dataclasses.replace(run, **changes)


def start_or_resume(workdir, run, every=3, sharding=None, **config):
    """What a main program does: from the latest checkpoint, where there is one."""
    with Checkpoints(workdir / "checkpoints", CheckpointConfig(every=every, **config)) as checkpoints:
        state, position = jax.jit(make_state, out_shardings=sharding)(), Position()
        if checkpoints.latest() is not None:
            state, meta = checkpoints.restore(jax.eval_shape(make_state))
            position = Position.from_meta(meta)
        with Recorder(workdir, resume_update=position.update, num_updates=run.num_updates) as recorder:
            return train(run, state, position, recorder, checkpoints)


def lines(workdir):
    """The record without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(workdir)]


def saved_updates(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


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

    def failing(state, batch):
        if next(calls) == call:
            raise KeyboardInterrupt
        return step(state, batch)

    return failing


def test_the_record_has_a_line_for_every_update_and_evaluation(whole):
    result, workdir = whole
    assert result.position.update == NUM_UPDATES and not result.stopped
    assert result.position.cursor == NUM_UPDATES * STEPS * SIZE
    record = read_metrics(workdir)
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
        {"loss": 1.0, "weight": 1.0, "accuracy": 1.0, "grad_norm": 0.0, "learning_rate": 0.1},
        {"loss": 90.0, "weight": 9.0, "accuracy": 3.0, "grad_norm": 5.0, "learning_rate": 0.1},
    ]
    expected = {"loss": 9.1, "accuracy": 0.4, "grad_norm": 5.0, "learning_rate": 0.1}
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

    def asking(state, batch):
        if next(asked) == update * STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)

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

    def counting(state, batch):
        events.append("step")
        return step(state, batch)

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
    def batches(cursor):
        for index, x in enumerate(make_batches(cursor)):
            number = cursor // SIZE + index
            yield x * jnp.float32(jnp.nan) if number == (update - 1) * STEPS + micro else x

    return batches


def test_a_loss_that_is_not_finite_stops_and_names_the_documents(tmp_path):
    run = make_run(make_batches=poison(update=5, micro=1))
    message = (
        r"the loss of update 5 is not finite, in micro-step 2 of 2 with documents 36 to 39; "
        r"the last good checkpoint is of update 4 in .*; lower optimizer\.learning_rate"
    )
    with pytest.raises(NonFiniteLoss, match=message):
        start_or_resume(tmp_path, run, every=1)
    assert saved_updates(tmp_path) == [3, 4]
    assert np.isnan(read_metrics(tmp_path)[-1]["loss"]) and read_metrics(tmp_path)[-1]["update"] == 5
    result = start_or_resume(tmp_path, make_run(), every=1)  # with the data mended
    assert result.position.update == NUM_UPDATES
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path))


def test_a_gradient_or_held_out_loss_that_is_not_finite_stops_too(tmp_path):
    step = make_run().step

    def infinite_gradient(state, batch):
        state, metrics = step(state, batch)
        return state, {**metrics, "grad_norm": jnp.float32(jnp.inf)}

    with pytest.raises(
        NonFiniteLoss, match=r"gradient of update 1 .* documents 0 to 7; there is no checkpoint"
    ):
        start_or_resume(tmp_path / "a", make_run(step=infinite_gradient))
    with pytest.raises(NonFiniteLoss, match=r"held-out loss after update 4 is nan; .* of update 3 "):
        start_or_resume(tmp_path / "b", make_run(evaluate=lambda state: {"loss": float("nan")}))
    assert saved_updates(tmp_path / "b") == [3]


def test_mfu_is_recorded_where_the_peak_is_known(tmp_path):
    start_or_resume(tmp_path, make_run(num_updates=2, flops_per_token=10.0, peak_flops=100.0))
    line = [line for line in read_metrics(tmp_path) if line["kind"] == "train"][1]
    assert line["mfu"] == 10.0 * line["tokens_per_second"] / 100.0


def test_what_does_not_fit_together_is_refused(tmp_path):
    recorder = Recorder(tmp_path, resume_update=0, num_updates=1)
    with Checkpoints(tmp_path / "c") as checkpoints, recorder:
        with pytest.raises(ValueError, match=r"the state is at update 0, the position at 3"):
            train(make_run(), make_state(), Position(update=3), recorder, checkpoints)
        with pytest.raises(RuntimeError, match=r"update 1 did not end after 3 micro-steps"):
            train(make_run(accumulation_steps=3), make_state(), Position(), recorder, checkpoints)
        few = make_run(make_batches=lambda cursor: (x for x in [jnp.ones((SIZE, LENGTH))]))
        with pytest.raises(UserError, match=r"the data ended within update 1"):
            train(few, make_state(), Position(), recorder, checkpoints)


def test_batches_are_closed_however_the_loop_ends(tmp_path):
    closed = []

    def batches(cursor):
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
    assert "stopping after this update" in capfd.readouterr().err


def start_program(workdir, **variables):
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", __file__, str(workdir)],
        env={**env, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(workdir, count, process):
    deadline = time.monotonic() + 120
    while len(read_metrics(workdir)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_program_that_gets_a_signal_saves_and_exits_cleanly(tmp_path):
    process = start_program(tmp_path)
    wait_for_lines(tmp_path, 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.strip() == "stopping after this update and a checkpoint; Ctrl-C interrupts at once"
    ended = json.loads(out.splitlines()[-1])
    assert ended["stopped"] and saved_updates(tmp_path)[-1] == ended["update"]


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
    assert saved_updates(tmp_path)[-1] == update
    result = start_or_resume(tmp_path, make_run(num_updates=update + 1))  # goes on in one process
    assert [line["update"] for line in lines(tmp_path) if line["kind"] == "train"] == [*range(1, update + 2)]
    whole = start_or_resume(tmp_path / "whole", make_run(num_updates=update + 1))
    np.testing.assert_allclose(result.state.params["w"], whole.state.params["w"], rtol=1e-5)


def slow_batches(cursor):
    """The batches, replicated over all processes, at a pace that leaves time for a signal."""
    sharding = NamedSharding(make_mesh(MeshConfig()), PartitionSpec())
    for x in make_batches(cursor):
        time.sleep(0.02)
        yield hosts.make_global(sharding, x.shape, np.arange(SIZE), np.asarray(x))


if __name__ == "__main__":
    hosts.initialize()
    replicated = NamedSharding(make_mesh(MeshConfig()), PartitionSpec())
    run = make_run(num_updates=1_000_000, make_batches=slow_batches)
    ended = start_or_resume(pathlib.Path(sys.argv[1]), run, sharding=replicated)
    print(json.dumps({"stopped": ended.stopped, "update": ended.position.update}))
