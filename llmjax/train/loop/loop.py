"""The training loop: one update after the other, without ever letting the device wait for the host.

All work is dispatched asynchronously. The host reads the metrics of an update only after it has dispatched the next
one, so the device always has work. Before the loop saves or evaluates, it waits for the last update and records it, so
the metrics file holds every line up to a checkpoint. `upkeep.py` does what is due between two updates.

Where a run stands is its `Position`. A loop that starts from a restored state and position goes on bit for bit like one
that never stopped, even in the middle of an update. This holds because the batches depend only on the cursor, the
randomness only on the update, and the decisions only on what was observed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax

from llmjax.errors import UserError
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.loop.run import Record, Result, Run, State
from llmjax.train.loop.run_clock import Clock
from llmjax.train.loop.run_position import PartialUpdateRecord, Position
from llmjax.train.loop.stop_request import Stopped, StopRequest
from llmjax.train.loop.update_totals import (
    mean_metrics,
    measure,
    total,
    worst_micro_step,
)
from llmjax.train.loop.upkeep import TrainingFailed, Upkeep
from llmjax.train.steering import spikes
from llmjax.train.steering.spikes import ON_SPIKE, Spike
from llmjax.train.steering.steering import Decision, Measured
from llmjax.train.update.engine import MicroMetrics

__all__ = ["TrainingFailed", "train"]

# A choice: after this many rewinds to the same checkpoint the run fails, because the data can hardly be the reason.
MAX_REWINDS = 10


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """An update that was dispatched and is not yet recorded.

    position   where the run stands after it
    decision   the steering's decision about it
    metrics    the metrics of each call of the step, still on the device
    before     the metrics of micro-steps that were done before the run was resumed
    data_wait  seconds spent waiting for batches
    is_open    whether it was stopped before its last micro-step
    """

    position: Position
    decision: Decision
    metrics: list[dict[str, jax.Array]]
    before: tuple[MicroMetrics, ...]
    data_wait: float
    is_open: bool


def train(
    run: Run,
    state: State,
    position: Position,
    recorder: Record,
    checkpoints: Checkpoints,
    stop: StopRequest | None = None,
) -> Result:
    """Trains from `position` to the end of the run, or until it is asked to stop; saves before it returns.

    state  donated
    stop   a StopRequest whose signal handlers are installed already; without one, this function makes its own

    Raises TrainingFailed where the training cannot go on; what failed is not saved. Raises FollowUpFailed where the
    training is saved, but an evaluation, samples or statistics failed.
    """
    if int(state.update) != position.update:
        raise ValueError(f"the state is at update {int(state.update)}, the position at {position.update}")
    position.check_partial_update(run.micro_batch_size, run.engine.stops_within)
    with stop.deferred() if stop is not None else StopRequest() as stop:
        loop = _Loop(run, state, position, recorder, checkpoints, stop)
        with contextlib.closing(loop):
            return loop.run_to_end()


class _Loop:
    """A run in motion: its state and position after the last dispatch, and the update that is not yet recorded."""

    def __init__(
        self,
        run: Run,
        state: State,
        position: Position,
        recorder: Record,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ):
        self.run, self.state, self.position = run, state, position
        self.recorder, self.checkpoints, self.stop = recorder, checkpoints, stop
        self.histories = position.histories or (run.steering.start(),) * 2
        self.clock = Clock(position.seconds)
        self.upkeep = Upkeep(run, position, recorder, checkpoints, stop, self.clock)
        self.pending: _Dispatched | None = None
        self.batches: Any = None
        # The length of the rows in `batches`.
        self.length = 0
        # The last batch that was dispatched, for the statistics of the layers.
        self.batch: Any = None
        # Rewinds to the checkpoint that is now the latest.
        self.rewinds = 0

    def run_to_end(self) -> Result:
        try:
            self.position = self.upkeep.begin(self.state, self._position_now(), self._last_batch)
            stopped = self._train()
        except Stopped:
            stopped = True
        self.checkpoints.wait()
        return Result(self.state, self._position_now(), stopped)

    def _train(self) -> bool:
        """Makes updates until the run ends or is asked to stop; returns whether it was asked to stop."""
        stopped = False
        while not self.upkeep.ends(self.position) and not stopped:
            update = self.position.update + 1
            with self.run.profiler.around(update, lambda: self.state, self.clock.forget):
                dispatched = self.dispatch()
            # Only now the host waits for the update before, while the device works on the new one. After a rewind the
            # new one is worth nothing.
            if self.settle():
                continue
            stopped = dispatched.is_open or (self.stop.poll() and not self.upkeep.ends(dispatched.position))
            self.position = dispatched.position
            if dispatched.is_open:
                self.save_partial_update(dispatched)
                break
            self.pending = dispatched
            if not (stopped or self.upkeep.pauses(self.position)) or self.settle():
                stopped = False
                continue
            self.position, saved = self.upkeep.pause(
                self.state, self._position_now(), self._last_batch, stopped
            )
            self.rewinds = 0 if saved else self.rewinds
            self.clock.restart()
        return stopped

    def close(self) -> None:
        """Ends the profile that is under way, and the thread that makes batches."""
        self.run.profiler.close()
        self._close_batches()

    def _close_batches(self) -> None:
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def dispatch(self) -> _Dispatched:
        """Starts the micro-steps of one update, waiting for batches but not for the device.

        Where the run is asked to stop between two micro-steps, the update stays open.
        """
        run, position, partial = self.run, self.position, self.position.partial_update
        before = () if partial is None else partial.metrics
        # A decision uses the history up to the last update but one. It is the same whether or not the last update has
        # been recorded, so a resumed run decides alike.
        history = self.histories[0 if self.pending is None else 1]
        decision = run.steering.decide(history, position.tokens, 0 if partial is None else partial.steps)
        if self.length != decision.length:
            self._close_batches()
            # The step compiles for the new length.
            self.clock.forget()
        if self.batches is None:
            self.batches, self.length = run.make_batches(position.cursor, decision.length), decision.length
        left = decision.steps - len(before)
        try:
            made = run.engine.update(
                run.step,
                self.state,
                self.batches,
                decision.inputs,
                left=left,
                is_asked_to_stop=self.stop.poll,
            )
        except StopIteration:
            text = f"the data ended within update {position.update + 1}; lower train.num_updates"
            raise UserError(text) from None
        self.state, self.batch = made.state, made.batch
        is_open = made.steps < left
        position = dataclasses.replace(position, cursor=position.cursor + made.steps * run.micro_batch_size)
        if not is_open:
            position = dataclasses.replace(
                position,
                update=position.update + 1,
                tokens=position.tokens + decision.steps * run.micro_batch_size * run.seq_len,
                before=position.tokens,
                evaluation=None,
                partial_update=None,
            )
        return _Dispatched(position, decision, made.metrics, before, made.waited, is_open)

    def settle(self) -> bool:
        """Waits for the pending update, records it and reacts to spikes; returns whether the run was rewound."""
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
                self._report("dropped", done, len(steps), number, self._left_out(done, steps, number))
        self._take_note(done, steps, measured, spike)
        went_back = False
        if spike is not None:
            went_back = self._react(spike, done, steps, measured.applied)
        reason = spikes.stop_reason(self.run.steering.stability, history.stability)
        if reason is not None and not went_back:
            raise self.upkeep.fail(reason, self.state, self._position_now())
        return went_back

    def _take_note(
        self, done: _Dispatched, steps: list[MicroMetrics], measured: Measured, spike: Spike | None
    ) -> None:
        """Tells the upkeep what became of an update."""
        is_dropped, update = total(steps, "dropped") > 0, done.position.update
        overflows = not math.isfinite(measured.grad_norm)
        left_out = not measured.applied and spike is None and (is_dropped or overflows)
        if left_out and not is_dropped:
            text = f"update {update} was left out, for the norm of its gradient is {measured.grad_norm}"
            self.recorder.event(update, "dropped", text)
        finite = measured.weight > 0 and math.isfinite(measured.mean_loss)
        position = dataclasses.replace(done.position, histories=self.histories, seconds=self.clock.total())
        self.upkeep.observe(position, finite=finite, applied=measured.applied, left_out=left_out)

    def _last_batch(self) -> Any:
        """The batch of the last call of the step. A run that has just resumed makes it again."""
        if self.batch is None:
            run, position = self.run, self.position
            trained = (position.tokens - position.before) // (run.micro_batch_size * run.seq_len)
            steps = 1 if run.engine.stops_within else max(trained, 1)
            first = max(position.cursor - steps * run.micro_batch_size, 0)
            batches = run.make_batches(first, run.steering.lengths.length(position.before))
            with contextlib.closing(batches):
                self.batch, _ = run.engine.next_batch(batches, steps)
        return self.batch

    def save_partial_update(self, dispatched: _Dispatched) -> None:
        """Saves an update that was stopped between two micro-steps, with the metrics of those that are done."""
        partial = PartialUpdateRecord(
            dispatched.decision.steps, self.run.micro_batch_size, tuple(self._fetch(dispatched))
        )
        self.position = dataclasses.replace(self.position, partial_update=partial)
        self.recorder.flush()
        self.run.save_partial_update(self.state, self.run.meta | self._position_now().to_meta())

    def _react(self, spike: Spike, done: _Dispatched, steps: list[MicroMetrics], applied: bool) -> bool:
        reaction = ON_SPIKE[self.run.steering.stability.on_spike]
        text = f"{spike.sentence}; {reaction.words[not applied]}"
        self._report("spike", done, len(steps), worst_micro_step(steps, spike.kind), f"stands out: {text}")
        return reaction.rewinds and self._rewind(done, spike)

    def _rewind(self, done: _Dispatched, spike: Spike) -> bool:
        """Goes back to the latest checkpoint, and on with the data after the spike; False where there is none."""
        self.checkpoints.wait()
        if self.checkpoints.latest() is None:
            self.recorder.event(
                done.position.update, "spike", "there is no checkpoint to go back to; trained on"
            )
            return False
        self.rewinds += 1
        if self.rewinds > MAX_REWINDS:
            reason = f"{MAX_REWINDS} times in a row a spike came after going back"
            raise self.upkeep.fail(reason, self.state, self._position_now())
        self.state, position = self.run.restore()
        self.position = dataclasses.replace(position, cursor=done.position.cursor)
        self.histories = position.histories or (self.run.steering.start(),) * 2
        self._close_batches()
        self.upkeep.went_back()
        self.recorder.rewind(position.update)
        skipped = done.position.cursor - position.cursor
        way = f"back from update {done.position.update} to {position.update}, past {skipped:,} sequences"
        self.recorder.event(position.update, "rewind", f"{way}: {spike.sentence}")
        self.clock.restart()
        return True

    def _left_out(self, done: _Dispatched, steps: list[MicroMetrics], number: int) -> str:
        """A phrase that says how much of a micro-step was left out, and which of its documents were not finite."""
        parts, dropped = self.run.steering.parts_per_micro_step, int(steps[number]["dropped"])
        of_parts = f" in {dropped} of {parts} parts" if dropped < parts else ""
        text = f"was not finite{of_parts} and left out{' there' if of_parts else ''}"
        if self.run.name_guilty is None:
            return text
        size = self.run.micro_batch_size
        first = done.position.cursor - (len(steps) - number) * size
        return f"{text}; {self.run.name_guilty(self.state, first, size)}"

    def _report(self, event: str, done: _Dispatched, count: int, number: int, text: str) -> None:
        """Records what happened in one micro-step of an update, with its documents."""
        size, update = self.run.micro_batch_size, done.position.update
        first = done.position.cursor - (count - number) * size
        try:
            path = self.run.write_documents(f"update-{update}-{event}-{number + 1}", first, size)
            written = f"written to {path}"
        # A full disk must not end a run for the sake of a message.
        except OSError as error:
            written = f"not written ({error.strerror})"
        documents = self.run.describe_batch(first, size)
        where = f"micro-step {number + 1} of {count} of update {update}"
        self.recorder.event(update, event, f"{where} {text}; {documents}, {written}")

    def _fetch(self, done: _Dispatched) -> list[MicroMetrics]:
        fetched = jax.device_get(done.metrics)
        return [*done.before, *self.run.engine.micro_metrics(fetched, done.decision.steps)]

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
            **({"packing_efficiency": total(steps, "weight") / positions} if run.weighs_all else {}),
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
            speed = trained * run.micro_batch_size * run.seq_len / seconds
            values["tokens_per_second"] = speed
            if run.peak_flops:
                flops = run.flops_per_token[done.decision.length]
                values["mfu"] = flops * speed / run.peak_flops
        return values

    def _position_now(self) -> Position:
        return dataclasses.replace(self.position, seconds=self.clock.total(), histories=self.histories)
