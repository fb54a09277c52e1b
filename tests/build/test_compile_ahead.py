"""The training step is compiled in a thread. Its first call compiles nothing, and errors come where they belong."""

import contextlib

import jax
import numpy as np
import pytest

from llmjax.build.compile_ahead import CompileAhead
from tests.build.test_program import T, program_for, ragged_batch

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compiled():
    """The names of the programs that are compiled within the `with` block."""
    names = []
    listen = lambda event, seconds, **more: names.append(more["fun_name"]) if event == COMPILED else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def first_call(program):
    """Makes the first micro-step of a run as its loop does."""
    state = program.init()
    arrays = ragged_batch(np.random.default_rng(0), program.batch.micro_batch_size)
    arrays |= {"index": np.arange(program.batch.micro_batch_size, dtype=np.int32)}
    return program.train_step(
        state, program.placement.place(arrays), program.steering.decide(program.steering.start(), 0).inputs
    )


def small_program(**changes):
    return program_for(jax.devices()[:1], model__num_layers=1, optimizer__name="adamw", **changes)


def test_the_first_call_finds_the_step_that_was_compiled_ahead():
    program = small_program()
    with compiled() as names, CompileAhead(program) as ahead:
        ahead.start(0)
        ahead.start(0)
        ahead.wait()
        assert names.count("jit(train_step)") == 1
        _, metrics = first_call(program)
    assert names.count("jit(train_step)") == 1 and "jit(create)" in names
    assert np.isfinite(metrics["loss"])


def test_nothing_is_compiled_ahead_for_rows_that_are_shorter_at_first():
    program = small_program(data__length_points=(f"0:{T // 2}", f"{16 * T}:{T}"))
    with compiled() as names:
        with CompileAhead(program) as ahead:
            ahead.start(0)
        assert "jit(train_step)" not in names
        with CompileAhead(program) as ahead:
            ahead.start(16 * T)
        assert "jit(train_step)" in names


def test_an_error_of_the_compiler_is_raised_by_the_call_of_the_step(monkeypatch):
    program = small_program()

    def fail(self):
        raise RuntimeError("no memory")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with CompileAhead(program) as ahead:
        ahead.start(0)
        ahead.wait()
    monkeypatch.undo()
    # The step itself still compiles: the error did not spoil it.
    _, metrics = first_call(program)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("started", [True, False])
def test_leaving_waits_for_the_thread(started):
    program = small_program()
    with CompileAhead(program) as ahead:
        if started:
            ahead.start(0)
    assert ahead._thread is None if not started else not ahead._thread.is_alive()
