"""The training loop: updates one after the other, with the host never in the way of the device.

Everything is dispatched asynchronously. The metrics of an update are fetched only when the next one has been
dispatched, so the device always has work. The loop drains before it evaluates or saves, so the metrics file
holds every line that belongs to a checkpoint.

A run is at a `Position`. A loop started from a restored state and its position goes on bit for bit like one
that never stopped, also in the middle of an update: batches follow from the cursor, randomness from the
update, decisions from what was observed, each from nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Any

import jax

from llmjax.errors import UserError
from llmjax.train import stability
from llmjax.train.checkpoint import Checkpoints
from llmjax.train.clock import Clock
from llmjax.train.metrics import Recorder
from llmjax.train.position import OpenWindow, Position
from llmjax.train.run import Result, Run, State
from llmjax.train.signals import StopRequest
from llmjax.train.stability import Spike
from llmjax.train.steering import Decision
from llmjax.train.tally import MicroMetrics, guiltiest, mean_metrics, measure, micro_metrics, total

MAX_REWINDS = 10  # to one and the same checkpoint


class TrainingFailed(UserError):
    """Updates keep failing, or the held-out loss is not finite: why, and where to go back to."""


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """An update under way: where the run stands after it, what was decided, its metrics on the device."""

    position: Position
    decision: Decision
    metrics: list[dict[str, jax.Array]]
    before: tuple[MicroMetrics, ...]  # of micro-steps done before the run was resumed
    data_wait: float
    is_open: bool  # stopped before its last micro-step


def train(run: Run, state: State, position: Position, recorder: Recorder, checkpoints: Checkpoints) -> Result:
    """Trains from `position` to the end of the run, or until SIGTERM or Ctrl-C; saves before it returns.

    `state` is donated. Raises TrainingFailed and saves nothing of what failed.
    """
    if int(state.update) != position.update:
        raise ValueError(f"the state is at update {int(state.update)}, the position at {position.update}")
    position.check_window(run.micro_batch_size, run.fused)
    with StopRequest() as stop:
        loop = _Loop(run, state, position, recorder, checkpoints, stop)
        with contextlib.closing(loop):
            return loop.run_to_end()


class _Loop:
    """A run in motion: the state and position after what was dispatched, and the update not yet recorded."""

    def __init__(
        self,
        run: Run,
        state: State,
        position: Position,
        recorder: Recorder,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ):
        self.run, self.state, self.position = run, state, position
        self.recorder, self.checkpoints, self.stop = recorder, checkpoints, stop
        self.histories = position.histories or (run.steering.start(),) * 2
        self.clock = Clock(position.seconds)
        self.pending: _Dispatched | None = None
        self.batches: Any = None
        self.length = 0  # of their rows
        self.batch: Any = None  # the last one dispatched
        self.rewinds = 0  # to the checkpoint that is now the latest

    def run_to_end(self) -> Result:
        self.evaluate_if_due()  # a run stopped just before an evaluation owes it
        stopped = False
        while self.position.tokens < self.run.steering.num_tokens and not stopped:
            dispatched = self.dispatch()
            if self.settle():
                continue  # back before what was just dispatched
            stopped = dispatched.is_open or (self.stop.poll() and not self._ends(dispatched.position))
            self.position = dispatched.position
            if dispatched.is_open:
                self.save_window(dispatched)
                break
            self.pending = dispatched
            if not (stopped or self.pauses()) or self.settle():
                stopped = False
                continue
            self.pause(stopped)
        self.checkpoints.wait()
        return Result(self.state, self._position_now(), stopped)

    def close(self) -> None:
        """Ends the thread that makes batches."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def dispatch(self) -> _Dispatched:
        """Starts the micro-steps of one update, waiting for batches but not for the device.

        A wish to stop is heeded between two micro-steps: then the update stays open.
        """
        run, position, window = self.run, self.position, self.position.window
        before = () if window is None else window.metrics
        # The same history whether or not the last update was recorded already.
        history = self.histories[0 if self.pending is None else 1]
        decision = run.steering.decide(history, position.tokens, 0 if window is None else window.steps)
        if self.length != decision.length:
            self.close()
            self.clock.forget()  # the step compiles
        if self.batches is None:
            self.batches, self.length = run.make_batches(position.cursor, decision.length), decision.length
        metrics: list[dict[str, jax.Array]] = []
        left, waited, is_open = decision.steps - len(before), 0.0, False
        while left and not is_open:
            count = left if run.fused else 1
            began = time.perf_counter()
            self.batch = self.batches.take(count) if run.fused else next(self.batches, None)
            waited += time.perf_counter() - began
            if self.batch is None:
                raise UserError(
                    f"the data ended within update {position.update + 1}; lower train.num_updates"
                )
            self.state, values = run.step(self.state, self.batch, decision.order)
            metrics.append(values)
            left -= count
            is_open = left > 0 and self.stop.poll()
        done = decision.steps - left
        position = dataclasses.replace(
            position, cursor=position.cursor + (done - len(before)) * run.micro_batch_size
        )
        if not is_open:
            position = dataclasses.replace(
                position,
                update=position.update + 1,
                tokens=position.tokens + done * run.micro_batch_size * run.seq_len,
                before=position.tokens,
                evaluation=None,
                window=None,
            )
        return _Dispatched(position, decision, metrics, before, waited, is_open)

    def settle(self) -> bool:
        """Waits for the update under way, records it, reacts to what happened in it; True where the run went back."""
        if self.pending is None:
            return False
        done, self.pending = self.pending, None
        steps = self._fetch(done)
        seconds = self.clock.lap()
        update = done.position.update
        if steps[-1]["is_update"] != 1:
            raise RuntimeError(f"update {update} did not end after {len(steps)} micro-steps")
        measured = measure(steps)
        history, spike = self.run.steering.observe(self.histories[1], done.decision, measured)
        self.histories = (self.histories[1], history)
        self.recorder.train(update, self._values(done, steps, seconds))
        for number, step in enumerate(steps):
            if step["dropped"]:
                self._report("dropped", done, len(steps), number, "was not finite and left out")
        went_back = False
        if spike is not None:
            went_back = self._react(spike, done, steps, measured.applied)
        reason = stability.stop_reason(self.run.steering.stability, history.stability)
        if reason is not None and not went_back:
            raise TrainingFailed(f"{reason}; {self._way_back()}")
        return went_back

    def pauses(self) -> bool:
        """Whether the loop is to drain now, in order to evaluate, to look at the layers or to save."""
        every = (self.run.evaluate_every, self.run.statistics_every, self.checkpoints.config.every)
        return self._ends(self.position) or any(map(self._is_due, every))

    def pause(self, stopped: bool) -> None:
        """What is done between two updates, the last of them recorded."""
        if self._is_due(self.run.statistics_every):
            values = self.run.statistics(self.state, self.batch)
            self.recorder.statistics(self.position.update, self._now() | values)
        if not stopped:
            self.evaluate_if_due()
        self.save_if_due(stopped)
        self.clock.restart()

    def evaluate_if_due(self) -> None:
        """Evaluates where the position asks for it and has not been."""
        run, update = self.run, self.position.update
        due = self._is_due(run.evaluate_every) or self._ends(self.position)
        if run.evaluate is None or self.position.evaluation is not None or not due:
            return
        results = {name: float(value) for name, value in run.evaluate(self.state).items()}
        self.recorder.evaluate(update, self._now() | results)
        if not math.isfinite(results["loss"]):
            raise TrainingFailed(
                f"the held-out loss after update {update} is {results['loss']}; {self._way_back()}"
            )
        run.sample(self.state, update)
        self.position = dataclasses.replace(self.position, evaluation=results)

    def save_if_due(self, stopped: bool) -> None:
        """Starts a checkpoint at its cadence, at the end, on a stop, and for a new best held-out loss."""
        evaluation, update = self.position.evaluation, self.position.update
        loss = None if evaluation is None else evaluation["loss"]
        is_best = loss is not None and self.checkpoints.would_be_best(loss)
        due = self._is_due(self.checkpoints.config.every) or self._ends(self.position)
        if not (stopped or is_best or due):
            return
        if self.histories[1].stability.skipped and not stopped and not self._ends(self.position):
            return  # parameters that no loss has yet been finite with do not replace those that had one
        self.recorder.flush()
        meta = self.run.meta | self._position_now().to_meta()
        if self.checkpoints.save(update, self.run.saved(self.state), meta, held_out_loss=loss):
            self.rewinds = 0

    def save_window(self, dispatched: _Dispatched) -> None:
        """Saves an update under way, with its micro-steps' numbers, in the place kept for such."""
        window = OpenWindow(
            dispatched.decision.steps, self.run.micro_batch_size, tuple(self._fetch(dispatched))
        )
        self.position = dataclasses.replace(self.position, window=window)
        self.recorder.flush()
        self.run.save_window(self.state, self.run.meta | self._position_now().to_meta())

    def _react(self, spike: Spike, done: _Dispatched, steps: list[MicroMetrics], applied: bool) -> bool:
        on_spike = self.run.steering.stability.on_spike
        what = {
            "warn": "trained on",
            "skip": "trained on" if applied else "update skipped",
            "rewind": "going back",
        }
        text = f"{spike.sentence}; {what[on_spike]}"
        self._report("spike", done, len(steps), guiltiest(steps, spike.kind), f"stands out: {text}")
        return on_spike == "rewind" and self._rewind(done, spike)

    def _rewind(self, done: _Dispatched, spike: Spike) -> bool:
        """Back to the latest checkpoint, but on with the data after the spike."""
        self.checkpoints.wait()
        if self.checkpoints.latest() is None:
            self.recorder.event(
                done.position.update, "spike", "there is no checkpoint to go back to; trained on"
            )
            return False
        self.rewinds += 1
        if self.rewinds > MAX_REWINDS:
            raise TrainingFailed(
                f"{MAX_REWINDS} times in a row a spike came after going back; {self._way_back()}"
            )
        self.state, position = self.run.restore()
        self.position = dataclasses.replace(position, cursor=done.position.cursor)
        self.histories = position.histories or (self.run.steering.start(),) * 2
        self.close()
        self.recorder.rewind(position.update)
        skipped = done.position.cursor - position.cursor
        way = f"back from update {done.position.update} to {position.update}, past {skipped:,} sequences"
        self.recorder.event(position.update, "rewind", f"{way}: {spike.sentence}")
        self.clock.restart()
        return True

    def _report(self, event: str, done: _Dispatched, count: int, number: int, text: str) -> None:
        """Records what happened in one micro-step of an update, with its documents."""
        size, update = self.run.micro_batch_size, done.position.update
        first = done.position.cursor - (count - number) * size
        path = self.run.write_documents(f"update-{update}-{event}-{number + 1}", first, size)
        documents = self.run.describe_batch(first, size)
        where = f"micro-step {number + 1} of {count} of update {update}"
        self.recorder.event(update, event, f"{where} {text}; {documents}, written to {path}")

    def _fetch(self, done: _Dispatched) -> list[MicroMetrics]:
        fetched = jax.device_get(done.metrics)
        return [*done.before, *micro_metrics(fetched, done.decision.steps, self.run.fused)]

    def _values(
        self, done: _Dispatched, steps: list[MicroMetrics], seconds: float | None
    ) -> dict[str, float | str]:
        """The line of an update in the metrics file."""
        run = self.run
        positions = len(steps) * run.micro_batch_size * run.seq_len
        values: dict[str, float | str] = {
            "tokens": done.position.tokens,
            "seconds": self.clock.total(),
            **mean_metrics(steps),
            "learning_rate": done.decision.learning_rate,
            "accumulation_steps": len(steps),
            "seq_len": done.decision.length,
            "packing_efficiency": total(steps, "weight") / positions,
            "data_wait": done.data_wait,
        }
        noise_scale = self.histories[1].controller.noise_scale
        if noise_scale is not None:
            values["noise_scale"] = noise_scale
        if done.decision.reason:
            values["reason"] = done.decision.reason
        dropped = total(steps, "dropped")
        if dropped:
            values["dropped"] = dropped
        if not steps[-1]["applied"]:
            values["skipped"] = 1
        if seconds is not None:
            trained = len(steps) - len(done.before)
            values["tokens_per_second"] = trained * run.micro_batch_size * run.seq_len / seconds
            if run.peak_flops:
                flops = run.flops_per_token[done.decision.length]
                values["mfu"] = flops * values["tokens_per_second"] / run.peak_flops
        return values

    def _now(self) -> dict[str, float]:
        return {"tokens": self.position.tokens, "seconds": self.clock.total()}

    def _position_now(self) -> Position:
        return dataclasses.replace(self.position, seconds=self.clock.total(), histories=self.histories)

    def _is_due(self, every: int) -> bool:
        """Whether the last update passed a multiple of `every` updates of the usual size."""
        unit = every * self.run.steering.tokens_per_update
        return unit > 0 and self.position.tokens // unit > self.position.before // unit

    def _ends(self, position: Position) -> bool:
        return position.tokens >= self.run.steering.num_tokens

    def _way_back(self) -> str:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        if latest is None:
            return "there is no checkpoint yet; lower optimizer.learning_rate or look at the documents"
        return (
            f"the last good checkpoint is of update {latest} in {self.checkpoints.directory}; "
            "lower optimizer.learning_rate or look at the documents, then resume"
        )
