"""The training loop: updates one after the other, with the host never in the way of the device.

Everything is dispatched asynchronously. The metrics of an update are fetched only when the next one has been
dispatched, so the device always has work; they are exact sums, added in float64 on the host and divided
once. The loop drains before it evaluates or saves, so no state is ever saved whose updates were not seen to
be finite, and the metrics file holds every line that belongs to a checkpoint.

A run is at a `Position`. A loop started from a restored state and its position goes on bit for bit like one
that never stopped: batches follow from the cursor, randomness from the update, both from nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llmjax.errors import UserError
from llmjax.train.checkpoint import Checkpoints
from llmjax.train.metrics import Recorder
from llmjax.train.signals import StopRequest

State = Any  # as in `state.TrainState`
Evaluation = dict[str, float]
OF_THE_UPDATE = ("grad_norm", "learning_rate")  # metrics of the last micro-step, not sums
NOT_RECORDED = ("weight", "is_update", "nonfinite")


class NonFiniteLoss(UserError):
    """The loss or the gradient is not finite: the update, its documents, and where to go back to."""


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come; saved with every checkpoint.

    update      optimizer updates done
    cursor      packed sequences consumed
    tokens      positions consumed, padding included
    seconds     wall time spent
    evaluation  the held-out results at this very update, if it was evaluated
    """

    update: int = 0
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluation: Evaluation | None = None

    @classmethod
    def from_meta(cls, meta: dict) -> Position:
        """The position that a checkpoint's meta holds."""
        return cls(**{field.name: meta[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of. Callables come from outside: the loop knows neither data nor evaluation.

    num_updates         at which the run ends
    accumulation_steps  micro-steps per update
    micro_batch_size    sequences per micro-step, over all devices
    seq_len             positions per sequence
    evaluate_every      updates between evaluations; 0: only at the end
    step                (state, batch) -> (state, metrics): one micro-step, with float32 scalars `loss`, `weight` and
                        further sums, and of the update `grad_norm`, `learning_rate` on its last micro-step
    make_batches        cursor -> an iterator of batches on the devices, from that sequence on, with `close()`
    evaluate            state -> held-out `loss`, `perplexity`, `bits_per_byte` (the same on every process), or None
                        where nothing is held out
    sample              (state, update) -> None, after each evaluation
    describe_batch      (first sequence, count) -> the documents in them, for a message
    saved               state -> what a checkpoint holds of it
    meta                what else goes into each checkpoint: config, versions, data fingerprint
    flops_per_token     of the model, forward and backward
    peak_flops          per second, of all devices together; 0: unknown
    """

    num_updates: int
    accumulation_steps: int
    micro_batch_size: int
    seq_len: int
    evaluate_every: int
    step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
    make_batches: Callable[[int], Iterator[Any]]
    evaluate: Callable[[State], Evaluation] | None
    describe_batch: Callable[[int, int], str]
    sample: Callable[[State, int], None] = lambda state, update: None
    saved: Callable[[State], State] = lambda state: state
    meta: dict = dataclasses.field(default_factory=dict)
    flops_per_token: float = 0.0
    peak_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended, and whether it was asked to stop before its last update."""

    state: State
    position: Position
    stopped: bool


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """An update under way: where the run stands after it, and its micro-steps' metrics on the device."""

    position: Position
    metrics: list[dict[str, jax.Array]]
    data_wait: float


def train(run: Run, state: State, position: Position, recorder: Recorder, checkpoints: Checkpoints) -> Result:
    """Trains from `position` to `run.num_updates`, or until SIGTERM or Ctrl-C; saves before it returns.

    `state` is donated. Raises NonFiniteLoss (at most one update late) and saves nothing from that update on.
    """
    if int(state.update) != position.update:
        raise ValueError(f"the state is at update {int(state.update)}, the position at {position.update}")
    clock = _Clock(position.seconds)
    host = _Host(run, recorder, checkpoints, clock)
    stopped = False
    with StopRequest() as stop:
        position = host.evaluate_if_due(state, position)  # a run stopped just before an evaluation owes it
        with contextlib.ExitStack() as stack:
            batches = _open(run, position, stack)
            pending = None
            while position.update < run.num_updates and not stopped:
                state, dispatched = _dispatch(run, state, position, batches)
                if pending is not None:
                    host.record(pending)
                pending, position = dispatched, dispatched.position
                stopped = stop.poll() and position.update < run.num_updates
                if not (stopped or host.pauses_at(position.update)):
                    continue
                host.record(pending)
                pending = None
                if not stopped:
                    position = host.evaluate_if_due(state, position)
                host.save_if_due(state, position, stopped)
                clock.restart()
        checkpoints.wait()
    return Result(state, dataclasses.replace(position, seconds=clock.total()), stopped)


def _open(run: Run, position: Position, stack: contextlib.ExitStack) -> Iterator[Any]:
    """The batches from `position` on; none are made where the run has ended."""
    if position.update >= run.num_updates:
        return iter(())
    return stack.enter_context(contextlib.closing(run.make_batches(position.cursor)))


def _dispatch(
    run: Run, state: State, position: Position, batches: Iterator[Any]
) -> tuple[State, _Dispatched]:
    """Starts the micro-steps of one update, waiting for batches but not for the device."""
    metrics, data_wait = [], 0.0
    for _ in range(run.accumulation_steps):
        before = time.perf_counter()
        batch = next(batches, None)
        data_wait += time.perf_counter() - before
        if batch is None:
            raise UserError(f"the data ended within update {position.update + 1}; lower train.num_updates")
        state, values = run.step(state, batch)
        metrics.append(values)
    sequences = run.accumulation_steps * run.micro_batch_size
    position = Position(
        update=position.update + 1,
        cursor=position.cursor + sequences,
        tokens=position.tokens + sequences * run.seq_len,
        seconds=position.seconds,
    )
    return state, _Dispatched(position, metrics, data_wait)


@dataclasses.dataclass(frozen=True)
class _Host:
    """What the host does between updates: record, evaluate, save."""

    run: Run
    recorder: Recorder
    checkpoints: Checkpoints
    clock: _Clock

    def record(self, done: _Dispatched) -> None:
        """Waits for an update and records it; raises NonFiniteLoss."""
        steps = jax.device_get(done.metrics)
        seconds = self.clock.lap()
        run, update = self.run, done.position.update
        if steps[-1].get("is_update", 1) != 1:
            raise RuntimeError(f"update {update} did not end after {len(steps)} micro-steps")
        positions = len(steps) * run.micro_batch_size * run.seq_len
        values = {
            "tokens": done.position.tokens,
            "seconds": self.clock.total(),
            **mean_metrics(steps),
            "accumulation_steps": len(steps),
            "packing_efficiency": sum(float(step["weight"]) for step in steps) / positions,
            "data_wait": done.data_wait,
        }
        if seconds is not None:
            values["tokens_per_second"] = positions / seconds
            if run.peak_flops:
                values["mfu"] = run.flops_per_token * values["tokens_per_second"] / run.peak_flops
        self.recorder.train(update, values)
        first = done.position.cursor - len(steps) * run.micro_batch_size
        self._check_finite(update, first, steps)

    def pauses_at(self, update: int) -> bool:
        """Whether the loop is to drain after `update`, in order to evaluate or to save."""
        return self._evaluates_at(update) or self._saves_at(update)

    def evaluate_if_due(self, state: State, position: Position) -> Position:
        """Evaluates where `position` asks for it and has not been; returns it with the results."""
        if position.evaluation is not None or not self._evaluates_at(position.update):
            return position
        results = {name: float(value) for name, value in self.run.evaluate(state).items()}
        values = {"tokens": position.tokens, "seconds": self.clock.total(), **results}
        self.recorder.evaluate(position.update, values)
        if not math.isfinite(results["loss"]):
            raise NonFiniteLoss(
                f"the held-out loss after update {position.update} is {results['loss']}; {self._way_back()}"
            )
        self.run.sample(state, position.update)
        return dataclasses.replace(position, evaluation=results)

    def save_if_due(self, state: State, position: Position, stopped: bool) -> None:
        """Starts a checkpoint at its cadence, at the end, on a stop, and for a new best held-out loss."""
        loss = None if position.evaluation is None else position.evaluation["loss"]
        is_best = loss is not None and self.checkpoints.would_be_best(loss)
        if not (stopped or is_best or self._saves_at(position.update)):
            return
        self.recorder.flush()
        position = dataclasses.replace(position, seconds=self.clock.total())
        meta = {**self.run.meta, **dataclasses.asdict(position)}
        self.checkpoints.save(position.update, self.run.saved(state), meta, held_out_loss=loss)

    def _evaluates_at(self, update: int) -> bool:
        return self.run.evaluate is not None and _is_due(
            update, self.run.evaluate_every, self.run.num_updates
        )

    def _saves_at(self, update: int) -> bool:
        return _is_due(update, self.checkpoints.config.every, self.run.num_updates)

    def _check_finite(self, update: int, first: int, steps: list[dict[str, Any]]) -> None:
        size = self.run.micro_batch_size
        for number, step in enumerate(steps):
            if not math.isfinite(step["loss"]):
                documents = self.run.describe_batch(first + number * size, size)
                raise NonFiniteLoss(
                    f"the loss of update {update} is not finite, in micro-step {number + 1} of {len(steps)} "
                    f"with {documents}; {self._way_back()}"
                )
        if not math.isfinite(steps[-1]["grad_norm"]):
            documents = self.run.describe_batch(first, size * len(steps))
            raise NonFiniteLoss(
                f"the gradient of update {update} is not finite, with {documents}; {self._way_back()}"
            )

    def _way_back(self) -> str:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        if latest is None:
            return "there is no checkpoint yet; lower optimizer.learning_rate or look at these documents"
        return (
            f"the last good checkpoint is of update {latest} in {self.checkpoints.directory}; "
            "lower optimizer.learning_rate or look at these documents, then resume"
        )


class _Clock:
    """Wall time of the run, and of single updates where they followed one another without a pause."""

    def __init__(self, seconds: float):
        self._begin = time.perf_counter() - seconds
        self._lap: float | None = None

    def total(self) -> float:
        """Seconds since the run began, in all its parts."""
        return time.perf_counter() - self._begin

    def lap(self) -> float | None:
        """Seconds since the last update ended; None for the first after a start, which compiles."""
        now, last = time.perf_counter(), self._lap
        self._lap = now
        return None if last is None else now - last

    def restart(self) -> None:
        """Ends a pause: what was spent on evaluation and saving belongs to no update."""
        self._lap = time.perf_counter()


def mean_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """One update's metrics from its micro-steps' sums: each divided once by the summed weight, in float64."""
    weight = sum(float(step["weight"]) for step in steps)
    values = {}
    for name in sorted(steps[0]):
        if name in OF_THE_UPDATE:
            values[name] = float(steps[-1][name])
        elif name not in NOT_RECORDED:
            total = sum(float(step[name]) for step in steps)
            values[name] = total / weight if weight else math.nan
    return values


def _is_due(update: int, every: int, last: int) -> bool:
    return update == last or (every > 0 and update > 0 and update % every == 0)
