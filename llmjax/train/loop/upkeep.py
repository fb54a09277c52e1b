"""What a run does between two updates: it saves, evaluates, samples, looks at its layers, and knows what to go back to.

The work is saved before anything that may fail: a checkpoint comes first, then the statistics, the evaluation and the
samples of the same update. The checkpoint says that it owes them until they are made, so that a run that ended in
the middle of them makes them good when it is started again.

A checkpoint is good once a finite loss has been seen with its parameters: that of the next update, that of an
evaluation, or at the end of a run without held-out documents that of one more micro-batch. Updates that are not
finite are left out and change nothing, so the state after them is saved as that of the last update that was applied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llmjax.errors import UserError
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.loop.run import Record, Run, State
from llmjax.train.loop.run_clock import Clock
from llmjax.train.loop.run_position import Position
from llmjax.train.loop.stop_request import Stopped, StopRequest


class TrainingFailed(UserError):
    """Updates keep failing, or a loss is not finite: why, and where to go back to."""


class FollowUpFailed(UserError):
    """The training is saved, but what was to be made of it failed: what, and why."""


def describe_failure(saved: str, what: str, error: Exception) -> str:
    """One sentence for the user: what is saved, what failed of what follows, and what to do."""
    reason = str(error).strip().split("\n")[0].rstrip(".")
    if not isinstance(error, UserError):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    remedy = "remove the cause and give the same command again, which makes up for it"
    return f"{saved}, but {what} failed ({reason}); {remedy}"


class Upkeep:
    """The upkeep of one run, between its updates.

    applied   the position after the last update that was applied, None before one is known
    left_out  how many updates since were left out because they were not finite
    """

    def __init__(
        self,
        run: Run,
        position: Position,
        recorder: Record,
        checkpoints: Checkpoints,
        stop: StopRequest,
        clock: Clock,
    ):
        self._run, self._recorder, self._clock = run, recorder, clock
        self._checkpoints, self._stop = checkpoints, stop
        self._unseen: int | None = checkpoints.latest()  # a checkpoint that no loss has been seen of yet
        self._begins = position.update == 0 and position.partial_update is None
        self._seen = False  # whether any loss of this run was finite
        known = position.histories is None or position.histories[1].stability.skipped == 0
        self.applied: Position | None = position if known and position.partial_update is None else None
        self.left_out = 0

    def is_due(self, position: Position, every: int) -> bool:
        """Whether the last update passed a multiple of `every` updates of the usual size."""
        unit = every * self._run.steering.tokens_per_update
        return unit > 0 and position.tokens // unit > position.before // unit

    def ends(self, position: Position) -> bool:
        """Whether the run ends at `position`."""
        return position.tokens >= self._run.steering.num_tokens

    def pauses(self, position: Position) -> bool:
        """Whether the loop is to drain now, in order to save, to evaluate or to look at the layers."""
        run = self._run
        every = (run.evaluate_every, run.statistics_every, self._checkpoints.config.every)
        return self.ends(position) or any(self.is_due(position, each) for each in every)

    def observe(self, position: Position, *, finite: bool, applied: bool, left_out: bool) -> None:
        """Takes note of an update: whether its loss was finite, and what became of it."""
        if finite:
            self._seen = True
            if self._unseen is not None:
                self._checkpoints.amend(self._unseen, finite_loss=True)
                self._unseen = None
        if applied:
            self.applied = position
        self.left_out = self.left_out + 1 if left_out else 0

    def went_back(self) -> None:
        """The run is at its latest checkpoint again."""
        self._unseen, self.left_out, self.applied = self._checkpoints.latest(), 0, None

    # --- between two updates ---

    def begin(self, state: State, position: Position, batch: Callable[[], Any]) -> Position:
        """What a run owes from before it was stopped; and at its end a checkpoint, should there be none."""
        if self.ends(position) and self._checkpoints.latest() is None:
            position = self._with_owed(position)
            self._save(state, position)
        elif position.owes or self._evaluates(position):
            self._recorder.forget(position.update)
            position = dataclasses.replace(position, owes=True)
        return self._follow_up(state, position, batch)

    def pause(
        self, state: State, position: Position, batch: Callable[[], Any], stopped: bool
    ) -> tuple[Position, bool]:
        """Saves, and then makes what is due at `position`, unless stopped; the position, and whether it saved."""
        if self.left_out and self.ends(position) and not stopped:
            which = "update was" if self.left_out == 1 else f"{self.left_out} updates were"
            raise self.fail(f"the last {which} not finite and left out", state, position)
        if self.left_out and stopped:
            return position, self._stop_in_damage(state, position)
        position = self._with_owed(position)
        saved = self._save_if_due(state, position, stopped)
        if not stopped:
            position = self._follow_up(state, position, batch)
        if self.applied is not None and self.applied.update == position.update:
            self.applied = position
        return position, saved

    def fail(self, reason: str, state: State, position: Position, *, bad: bool = False) -> TrainingFailed:
        """The error to raise; keeps a checkpoint from before the damage and gives up those that are worth nothing.

        `bad`: it is known that the parameters give no finite loss. Where updates were left out, it is looked into:
        gradients may overflow while the loss is still a number.
        """
        self._checkpoints.wait()
        if self.left_out and not bad:
            good = self._looks_good(state, position, deep=True)
            if good:
                self._save_applied(state)
            self._mark_applied(good)
        self._checkpoints.give_up_after(self._checkpoints.latest_good())
        if self._checkpoints.latest() is None and self._begins and self._seen and self._run.begin is not None:
            first = Position()
            meta = self._run.meta | first.to_meta() | {"finite_loss": True}
            self._checkpoints.save(0, self._run.saved(self._run.begin()), meta)
        return TrainingFailed(f"{reason}; {self.way_back()}")

    def way_back(self) -> str:
        """Which checkpoint is the last good one, and what to do."""
        self._checkpoints.wait()
        good = self._checkpoints.latest_good()
        if good is None:
            return (
                "there is no good checkpoint yet; lower optimizer.learning_rate or look at the documents, then "
                "start again"
            )
        return (
            f"the last good checkpoint is of update {good} in {self._checkpoints.directory}; "
            "lower optimizer.learning_rate or look at the documents, then resume"
        )

    def _evaluates(self, position: Position) -> bool:
        """Whether an evaluation is due at `position` and was not made."""
        due = self.is_due(position, self._run.evaluate_every) or self.ends(position)
        return due and self._run.evaluate is not None and position.evaluation is None

    def _with_owed(self, position: Position) -> Position:
        owes = (
            self._evaluates(position)
            or self.is_due(position, self._run.statistics_every)
            or (self.ends(position) and self._run.evaluate is None)
        )
        return dataclasses.replace(position, owes=owes)

    def _save_if_due(self, state: State, position: Position, stopped: bool) -> bool:
        """Saves at the cadence, at the end, on a stop, and for an evaluation whose result may be the best."""
        config = self._checkpoints.config
        due = stopped or self.is_due(position, config.every) or self.ends(position)
        spare = not due and config.keep_best and self._evaluates(position)
        assert position.histories is not None  # the loop gives its own
        skipped = position.histories[1].stability.skipped
        if not (due or spare) or (skipped and not stopped and not self.ends(position)):
            return False  # nor do parameters that no loss has yet been finite with replace those that had one
        return self._save(state, position, spare=spare)

    def _save(self, state: State, position: Position, *, spare: bool = False, **facts: Any) -> bool:
        self._recorder.flush()
        meta = self._run.meta | position.to_meta() | {"finite_loss": None} | facts
        rank = None if position.evaluation is None else self._rank(position.evaluation)
        if not self._checkpoints.save(position.update, self._run.saved(state), meta, rank=rank, spare=spare):
            self._checkpoints.amend(position.update, spare=False)
            return False
        self._unseen = position.update
        return True

    def _save_applied(self, state: State) -> bool:
        """Saves the state as that of the last update that was applied, which it is; False where there is that."""
        applied = self.applied
        if applied is None or applied.update == 0:
            return False
        update = jax.device_put(np.int32(applied.update), state.update.sharding)
        return self._save(dataclasses.replace(state, update=update), applied)

    def _stop_in_damage(self, state: State, position: Position) -> bool:
        """Saves what is there after updates that were left out, and then asks whether it is any good."""
        saved = self._save_applied(state)
        if self.applied is not None:
            which = "update was" if self.left_out == 1 else f"{self.left_out} updates were"
            text = f"the last {which} left out, so update {self.applied.update} is what the run goes on from"
            self._recorder.event(position.update, "stop", text)
            self._mark_applied(self._looks_good(state, position))
        return saved

    def _mark_applied(self, good: bool | None) -> None:
        if self.applied is not None and good is not None:
            self._checkpoints.amend(self.applied.update, finite_loss=good)

    def _looks_good(self, state: State, position: Position, *, deep: bool = False) -> bool | None:
        """Whether the parameters give a finite loss now, and if `deep` finite gradients; None where it cannot be told.

        They are tried on the first micro-batch of the run, with which better ones gave a finite loss.
        """
        run = self._run
        try:
            if run.loss is None:
                return (
                    math.isfinite(run.evaluate(state)[run.score.name]) if run.evaluate is not None else None
                )
            with contextlib.closing(
                run.make_batches(0, run.steering.lengths.length(position.before))
            ) as batches:
                batch, _ = run.engine.next_batch(batches, 1)
            values = [run.loss(state, batch)]
            if deep:
                values += jax.tree.leaves(run.statistics(state, batch))
            return bool(np.isfinite(values).all())
        except (Exception, Stopped):  # it is asked after another failure, or on the way out
            return None

    # --- what follows a save ---

    def _follow_up(self, state: State, position: Position, batch: Callable[[], Any]) -> Position:
        """Makes the statistics, the evaluation and the samples that `position` owes; the position without the debt."""
        if not position.owes:
            return position
        what = "looking at its layers"
        try:
            self._stop.check()
            if self.is_due(position, self._run.statistics_every):
                values = self._run.statistics(state, batch())
                self._recorder.statistics(position.update, self._now(position) | values)
            what = "evaluation"
            results = self._evaluate(state, position)
            what = "sampling"
            if results is not position.evaluation:
                self._run.sample(state, position.update)
            what = "writing its results"
            return self._settle_debt(state, position, results)
        except TrainingFailed:
            raise
        except Stopped:
            self._save_undue(state, position)
            raise
        except Exception as error:
            if jax.process_count() == 1:  # other processes may not be here, and saving takes all of them
                self._save_undue(state, position)
            self._checkpoints.wait()
            saved = f"training is saved in {self._checkpoints.directory} up to update {self._checkpoints.latest()}"
            raise FollowUpFailed(describe_failure(saved, what, error)) from error

    def _evaluate(self, state: State, position: Position) -> dict[str, float] | None:
        """The held-out results at `position`, recorded; None where nothing is held out or due."""
        evaluate = self._run.evaluate
        if evaluate is None or not self._evaluates(position):
            return position.evaluation
        results = {name: float(value) for name, value in evaluate(state).items()}
        self._recorder.evaluate(position.update, self._now(position) | results)
        score = self._run.score
        if not math.isfinite(results[score.name]):
            reason = f"the {score.label} after update {position.update} is {results[score.name]}"
            raise self.fail(reason, state, position, bad=True)
        return results

    def _settle_debt(
        self,
        state: State,
        position: Position,
        results: dict[str, float] | None,
    ) -> Position:
        """Says beside the checkpoint what was found, and that nothing is owed any more."""
        facts: dict[str, Any] = {"owes": False}
        if results is not None and results is not position.evaluation:
            rank = self._rank(results)
            best = self._checkpoints.would_be_best(rank)
            facts |= {"evaluation": results, "rank": rank, "finite_loss": True}
            facts |= {"spare": False} if best else {}
        elif self.ends(position) and self._run.evaluate is None:
            good = self._looks_good(state, position)
            if good is False:
                reason = f"the loss with the parameters of update {position.update} is not finite"
                raise self.fail(reason, state, position, bad=True)
            facts |= {"finite_loss": good}
        self._recorder.flush()
        if facts.get("finite_loss") and self._unseen == position.update:
            self._unseen = None
        self._checkpoints.amend(position.update, **facts)
        return dataclasses.replace(position, evaluation=results, owes=False)

    def _save_undue(self, state: State, position: Position) -> None:
        """Saves what no cadence asked for, before the run ends early."""
        if self.left_out:
            self._save_applied(state)
        elif position.partial_update is None:
            self._save(state, position)

    def _rank(self, results: dict[str, float]) -> float:
        """What checkpoints are ordered by."""
        return self._run.score.rank(results[self._run.score.name])

    def _now(self, position: Position) -> dict[str, float]:
        return {"tokens": position.tokens, "seconds": self._clock.total()}
