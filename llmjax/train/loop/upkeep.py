"""What a run does between two updates: it saves, records statistics of its layers, evaluates, and samples.

The work is saved before anything that may fail. The checkpoint comes first, then the statistics, the evaluation and the
samples of the same update. Until these are made, the checkpoint says that it owes them, and a run that ended in the
middle of them makes them when it is started again.

A checkpoint is good once its parameters have given a finite loss: in the next update, in an evaluation or, at the end
of a run without held-out documents, on one more micro-batch. An update that is not finite is left out and changes
nothing. The state after it is therefore saved as the state of the last update that was applied.
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
    """Updates keep failing, or a loss is not finite. The message says why, and which checkpoint to go back to."""


class FollowUpFailed(UserError):
    """The training is saved, but its statistics, evaluation or samples failed. The message says which, and why."""


def describe_failure(saved: str, what: str, error: Exception) -> str:
    """One sentence for the user: what is saved, what failed after that, and what to do."""
    reason = str(error).strip().split("\n")[0].rstrip(".")
    if not isinstance(error, UserError):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    remedy = "remove the cause and give the same command again, which makes up for it"
    return f"{saved}, but {what} failed ({reason}); {remedy}"


class Upkeep:
    """Saves, evaluates and samples between the updates of one run, and knows which of its states is good.

    applied   the position after the last update that was applied; None where it is not known
    left_out  how many updates since then were left out because they were not finite
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
        # The checkpoint whose parameters have not given a loss yet.
        self._unseen: int | None = checkpoints.latest()
        self._begins = position.update == 0 and position.partial_update is None
        # Whether any loss of this run was finite.
        self._seen = False
        known = position.histories is None or position.histories[1].stability.skipped == 0
        self.applied: Position | None = position if known and position.partial_update is None else None
        self.left_out = 0

    def is_due(self, position: Position, every: int) -> bool:
        """Whether the last update passed a multiple of `every` updates of the usual size; never where `every` is 0."""
        unit = every * self._run.steering.tokens_per_update
        return unit > 0 and position.tokens // unit > position.before // unit

    def ends(self, position: Position) -> bool:
        """Whether the run ends at `position`."""
        return position.is_over(self._run.steering.num_tokens, self._run.patience)

    def pauses(self, position: Position) -> bool:
        """Whether the loop must pause after `position`, to save, to evaluate or to record statistics."""
        run = self._run
        every = (run.evaluate_every, run.statistics_every, self._checkpoints.config.every)
        return self.ends(position) or any(self.is_due(position, each) for each in every)

    def observe(self, position: Position, *, finite: bool, applied: bool, left_out: bool) -> None:
        """Takes note of an update.

        finite    its loss was finite, so the parameters before it are good
        applied   it changed the parameters
        left_out  it was left out because it was not finite
        """
        if finite:
            self._seen = True
            if self._unseen is not None:
                self._checkpoints.amend(self._unseen, finite_loss=True)
                self._unseen = None
        if applied:
            self.applied = position
        self.left_out = self.left_out + 1 if left_out else 0

    def went_back(self) -> None:
        """Takes note that the run was rewound to its latest checkpoint."""
        self._unseen, self.left_out, self.applied = self._checkpoints.latest(), 0, None

    # --- between two updates ---

    def begin(self, state: State, position: Position, batch: Callable[[], Any]) -> Position:
        """Makes what a resumed run still owes, and saves a run that ends at once without a checkpoint.

        `batch()` gives the last batch, for the statistics. Returns the position without the debt.
        """
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
        """Saves if that is due, and makes what is due at `position` unless the run is being stopped.

        Returns the position, with what was found out, and whether a checkpoint was saved.
        """
        if self.left_out and self.ends(position) and not stopped:
            which = "update was" if self.left_out == 1 else f"{self.left_out} updates were"
            raise self.fail(f"the last {which} not finite and left out", state, position)
        if self.left_out and stopped:
            return position, self._stop_in_damage(state, position)
        position = self._with_owed(position)
        saved = self._save_if_due(state, position, stopped)
        if not stopped:
            position = self._follow_up(state, position, batch)
            saved = self._stop_early(state, position) or saved
        if self.applied is not None and self.applied.update == position.update:
            self.applied = position
        return position, saved

    def fail(self, reason: str, state: State, position: Position, *, bad: bool = False) -> TrainingFailed:
        """The error to raise, once a good checkpoint is kept and later ones are given up.

        bad  it is known that the parameters give no finite loss. Otherwise, where updates were left out, the parameters
             are tried, because gradients can overflow while the loss is still finite
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
        """Names the last good checkpoint and says what to do, for an error."""
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
            # Parameters that have given no finite loss do not replace a checkpoint whose parameters have.
            return False
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
        """Saves `state` as the state of the last applied update; False where there is none, or it is saved already.

        The updates since were left out, so `state` differs only in its count of updates.
        """
        applied = self.applied
        if applied is None or applied.update == 0:
            return False
        update = jax.device_put(np.int32(applied.update), state.update.sharding)
        return self._save(dataclasses.replace(state, update=update), applied)

    def _stop_in_damage(self, state: State, position: Position) -> bool:
        """Saves the last applied update on a stop after updates that were left out, and tries whether it is good."""
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
        """Whether the parameters give a finite loss and, if `deep`, finite gradients; None where that cannot be told.

        They are tried on the first micro-batch of the run, which is known to give finite losses with good parameters.
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
        # This runs after another failure or while the run stops, which matter more than a failure here.
        except (Exception, Stopped):
            return None

    # --- what follows a save ---

    def _follow_up(self, state: State, position: Position, batch: Callable[[], Any]) -> Position:
        """Makes the statistics, the evaluation and the samples that `position` owes; returns it without the debt."""
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
            # A save takes all processes, and the others may not have failed.
            if jax.process_count() == 1:
                self._save_undue(state, position)
            self._checkpoints.wait()
            saved = f"training is saved in {self._checkpoints.directory} up to update {self._checkpoints.latest()}"
            raise FollowUpFailed(describe_failure(saved, what, error)) from error

    def _evaluate(self, state: State, position: Position) -> dict[str, float] | None:
        """Evaluates if that is due, and records the scores; otherwise returns the scores in `position`, or None."""
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
        """Amends the checkpoint with what was found out, and with the fact that it owes nothing any more."""
        facts: dict[str, Any] = {"owes": False}
        if results is not None and results is not position.evaluation:
            rank = self._rank(results)
            best = self._checkpoints.would_be_best(rank)
            facts |= {"evaluation": results, "rank": rank, "finite_loss": True}
            facts |= {"spare": False} if best else {}
            position = position.after_evaluation(results, rank)
            facts |= {"best_rank": position.best_rank, "waited": position.waited}
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

    def _stop_early(self, state: State, position: Position) -> bool:
        """Says so and saves where the evaluation at `position` ends the run before its last token."""
        run, early = self._run, not position.is_over(self._run.steering.num_tokens, 0)
        if not (early and position.has_waited(run.patience)):
            return False
        best = self._checkpoints.best()
        where = "" if best is None else f"; the best checkpoint is of update {best}"
        count = position.waited
        times = f"{count} evaluations in a row" if count > 1 else "the last evaluation"
        text = f"the {run.score.label} has not become better in {times}, so that"
        self._recorder.event(
            position.update, "stop", f"{text} train.patience={run.patience} ends the run{where}"
        )
        return self._save(state, position, finite_loss=True)

    def _save_undue(self, state: State, position: Position) -> None:
        """Saves the run before it ends early, although no checkpoint is due."""
        if self.left_out:
            self._save_applied(state)
        elif position.partial_update is None:
            self._save(state, position)

    def _rank(self, results: dict[str, float]) -> float:
        """The number by which checkpoints are ordered, the lowest being the best."""
        return self._run.score.rank(results[self._run.score.name])

    def _now(self, position: Position) -> dict[str, float]:
        return {"tokens": position.tokens, "seconds": self._clock.total()}
