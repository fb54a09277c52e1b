"""Runs whose sequences change in length: the same losses however the work is cut, and exact on resume."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny_run
from some_slow import often
from tiny_run import command

from llmjax.data.packing.make_plan import plan_packing
from llmjax.data.pipeline import PackedSequences
from llmjax.types import Batch
from tests.build.test_program import UPDATES, T, V, program_for
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

POINTS = (f"0:{T // 4}", f"{32 * T}:{T}", f"{64 * T}:{T // 2}")  # updates of 16 rows: two, two, one


COMPILE, COMPILED = "/jax/core/compile/backend_compile_duration", []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: COMPILED.append(event))


class FakeStore:
    """Documents in which a token follows from the one before."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def tokens(self, doc, start, stop):
        return (doc + np.arange(start, stop)) % (V - 1) + 1


def make_source():
    lengths = np.random.default_rng(0).integers(2, 3 * T, 150)
    return PackedSequences(FakeStore(lengths), plan_packing(lengths, np.arange(150), T, 0), 0)


def program_with(devices, **changes):
    changes = {"data__length_points": POINTS, "compute__accumulation_steps": 2} | changes
    return program_for(devices, **changes)


def trace(program):
    """Loss per target of each update, and the step's compiles so far after each."""
    source, state, steering = make_source(), program.init(), program.steering
    losses, compiles, cursor, tokens, before = [], [], 0, 0, COMPILED.count(COMPILE)
    for _ in range(UPDATES):
        decision, sums = steering.decide(steering.start(), tokens), []
        with program.placement.batches(source, start=cursor, length=decision.length) as feed:
            for _ in range(1 if not program.engine.stops_within else decision.steps):
                batch = feed.take(decision.steps) if not program.engine.stops_within else next(feed)
                assert batch.tokens.shape[-1] == decision.length
                state, metrics = program.train_step(state, batch, decision.inputs)
                sums.append(jax.tree.map(lambda x: float(np.sum(x)), jax.device_get(metrics)))
        cursor += decision.steps * program.batch.micro_batch_size
        tokens += decision.steps * program.batch.micro_batch_size * T
        losses.append(sum(m["loss"] for m in sums) / sum(m["weight"] for m in sums))
        compiles.append(COMPILED.count(COMPILE) - before)
    return np.array(losses), compiles


@pytest.fixture(scope="module")
def one_device():
    return trace(program_with(jax.devices()[:1]))


def test_the_step_compiles_once_for_each_length(one_device):
    losses, compiles = one_device
    assert compiles == [1, 1, 2, 2, 3]
    whole, _ = trace(program_with(jax.devices()[:1], data__length_points=()))
    assert abs(losses - whole).min() > 1e-4  # the lengths do make a difference


@pytest.mark.parametrize(
    "data, fsdp, seq, tensor", often([(1, 1, 8, 1), (2, 2, 2, 1)], lambda shape: shape[1] == 2)
)
def test_every_mesh_gives_the_same_losses(data, fsdp, seq, tensor, one_device):
    program = program_with(
        jax.devices(), mesh__data=data, mesh__fsdp=fsdp, mesh__seq=seq, mesh__tensor=tensor
    )
    np.testing.assert_allclose(trace(program)[0], one_device[0], rtol=1e-5)


def test_fused_updates_give_the_same_losses(one_device):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__seq": 2}
    losses, compiles = trace(program_with(jax.devices(), compute__engine="fused", **mesh))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert compiles == [1, 1, 2, 2, 3]


def test_another_cut_into_micro_steps_gives_the_same_losses(one_device):
    program = program_with(jax.devices()[:1], compute__accumulation_steps=8)
    np.testing.assert_allclose(trace(program)[0], one_device[0], rtol=1e-5)


@pytest.mark.slow
def test_dropout_is_that_of_the_piece_wherever_it_is_computed():
    losses = [
        trace(program_with(devices, model__dropout=0.2, compute__accumulation_steps=k, mesh__data=data))[0]
        for devices, k, data in ((jax.devices()[:1], 4, 1), (jax.devices(), 2, 8))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"transformer__position": "learned", "transformer__window": 6}], ids=str
)
def test_cut_rows_have_the_loss_and_gradient_of_whole_ones_whose_documents_end_at_the_cuts(changes):
    program = program_for(jax.devices()[:1], compute__accumulation_steps=1, **changes)
    source, length = make_source(), T // 4
    by_hand = source.read(np.arange(16))
    for b in range(16):
        segment, position = 0, 0
        for t in range(T):
            if not by_hand["weights"][b, t]:
                continue
            starts = t % length == 0 or by_hand["positions"][b, t] == 0
            segment, position = (segment + 1, 0) if starts else (segment, position + 1)
            by_hand["segments"][b, t], by_hand["positions"][b, t] = segment, position
    with program.placement.batches(source, length=length) as feed:
        cut = next(feed)
    assert cut.tokens.shape == (64, length)
    state, decision = program.init(), program.steering.decide(program.steering.start(), 0)
    _, expected = program.train_step(state, Batch(**by_hand), decision.inputs)
    _, found = program.train_step(program.init(), cut, decision.inputs)
    for name in ("loss", "weight", "accuracy", "grad_norm", "square_total"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


# --- whole runs ---

SETTINGS = {"train__num_updates": 8, "evaluate__every": 4, "checkpoint__every": 3}
GROWING = ("--config.data.length_points=0:8,1024:16", "--config.data.length_points=2048:32")  # 512 an update
LENGTHS = [8, 8, 16, 16, 32, 32, 32, 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curriculum")
    tiny_run.write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """The workdir of a run that never stopped."""
    from llmjax import main

    assert main.main(command(folder, f"--workdir={folder / 'whole'}", *GROWING, **SETTINGS)) == 0
    return folder / "whole"


def lengths(workdir):
    return [line["seq_len"] for line in tiny_run.read_lines(workdir) if line["kind"] == "train"]


def test_the_plan_the_metrics_and_the_report_say_the_lengths(whole, folder, capsys):
    assert lengths(whole) == LENGTHS
    assert "Sequence length" in (whole / "report.html").read_text()
    out = run(capsys, command(folder, f"--workdir={whole}", *GROWING, **SETTINGS))
    assert "rows of 8 tokens, 16 from 1,024 tokens seen on, 32 from 2,048 tokens seen on" in out
    # What is held out is scored in whole rows throughout.
    told = run(capsys, ["llmjax", f"--workdir={whole}", "--mode=evaluate"])
    assert f"{tiny_run.read_lines(whole)[-1]['loss']:.4f} nats per token" in told


@pytest.mark.parametrize("update", [2, 3])
def test_a_run_killed_around_a_change_of_length_and_resumed_equals_one_that_was_not(
    update, whole, folder, capsys, monkeypatch, tmp_path
):

    workdir, calls, original = tmp_path / "run", iter(range(100)), tiny_run.in_modes("make_run")

    def make_run(*args):
        made = original(*args)

        def step(*arrays):
            if next(calls) == 2 * update:
                raise RuntimeError("killed")
            return made.step(*arrays)

        return dataclasses.replace(made, step=step)

    tiny_run.replace_in_modes(monkeypatch, "make_run", make_run)
    with pytest.raises(RuntimeError, match="killed"):
        run(capsys, command(folder, f"--workdir={workdir}", *GROWING, **SETTINGS))
    monkeypatch.undo()
    run(capsys, command(folder, f"--workdir={workdir}", *GROWING, **SETTINGS))
    assert tiny_run.read_lines(workdir) == tiny_run.read_lines(whole)


@pytest.mark.parametrize("call", [3, 4])  # at the change, and in the middle of the first update after it
def test_a_run_stopped_around_a_change_of_length_and_resumed_equals_one_that_was_not(
    call, whole, folder, capsys, monkeypatch, tmp_path
):
    workdir, polls = tmp_path / "run", iter(range(100))
    monkeypatch.setattr("llmjax.train.loop.stop_request.StopRequest.poll", lambda self: next(polls) == call)
    out = run(capsys, command(folder, f"--workdir={workdir}", *GROWING, **SETTINGS), code=75)
    assert re.search(r"stopped after update \d( and 1 of 2 micro-steps of the next)? and saved", out)
    monkeypatch.undo()
    run(capsys, command(folder, f"--workdir={workdir}", *GROWING, **SETTINGS))
    assert tiny_run.read_lines(workdir) == tiny_run.read_lines(whole)


@pytest.mark.slow
def test_a_fused_run_on_a_mesh_has_the_losses_of_micro_steps(whole, folder, capsys):
    workdir = folder / "fused"
    settings = SETTINGS | {"compute__engine": "fused", "mesh__fsdp": 2, "mesh__data": 2, "mesh__seq": 2}
    run(capsys, command(folder, f"--workdir={workdir}", *GROWING, **settings))
    assert lengths(workdir) == LENGTHS
    assert tiny_run.losses(workdir) == pytest.approx(tiny_run.losses(whole), rel=1e-5)


def test_lengths_that_do_not_cut_a_row_are_one_sentence(folder, capsys):
    words = command(folder, f"--workdir={folder / 'refused'}", "--config.data.length_points=0:12,512:32")
    assert "data.length_points has 0:12, but rows of data.seq_len=32" in refuse(capsys, words)
    words = command(folder, f"--workdir={folder / 'refused'}", *GROWING, "--config.data.length_points=9:4")
    assert "goes backwards from 2048:32 to 9:4" in refuse(capsys, words)
    split = command(folder, "--config.data.length_points=0:4", mesh__seq=8)
    assert "0:4, but 4 is not divisible by mesh.seq=8; use for example 8" in refuse(capsys, split)
