"""How far a run has come: what a checkpoint holds beside its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmjax.errors import UserError
from llmjax.train.steering.steering import History

# Under which name versions before 0.2 wrote `Position.partial_update`.
OLD_KEYS = {"partial_update": "window"}
# Fields that checkpoints of older versions lack, with what they mean there: nothing is owed, and nothing was counted.
NEWER = {"owes": False, "best_rank": None, "waited": 0}


@dataclasses.dataclass(frozen=True)
class PartialUpdateRecord:
    """What the host knows of an update that was stopped between two of its micro-steps.

    The gradient sums so far lie in the state, see `accumulate.PartialUpdate`.

    steps             micro-steps of the whole update, as decided when it began
    micro_batch_size  sequences of each of its micro-steps
    metrics           the numbers of each micro-step that is done
    """

    steps: int
    micro_batch_size: int
    metrics: tuple[dict[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands. Every checkpoint holds one; a run that resumes goes on from it bit for bit.

    update      optimizer updates done
    cursor      packed sequences consumed
    tokens      positions trained on, padding included, which schedules follow. It is less than cursor x seq_len after a
                rewind, which skips data
    before      `tokens` before the last update
    seconds     wall time spent, over all parts of the run
    evaluation  held-out scores of the parameters as they are now; None if they were not evaluated
    histories   what the steering observed up to the last update but one, and up to the last; None at the start
    partial_update  the update under way; None between updates
    best_rank   the lowest rank of an evaluation so far (`Score.rank`); None before the first
    waited      evaluations in a row, up to the last, that did not have a lower rank than all before
    owes        whether statistics, evaluation or samples that are due at this update are still to be made
    """

    update: int = 0
    cursor: int = 0
    tokens: int = 0
    before: int = 0
    seconds: float = 0.0
    evaluation: dict[str, float] | None = None
    histories: tuple[History, History] | None = None
    partial_update: PartialUpdateRecord | None = None
    owes: bool = False
    best_rank: float | None = None
    waited: int = 0

    def is_over(self, num_tokens: int, patience: int) -> bool:
        """Whether the run ends here: after its tokens, or after `patience` evaluations without a better score."""
        return self.tokens >= num_tokens or self.has_waited(patience)

    def has_waited(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row had no better score; never where it is 0."""
        return 0 < patience <= self.waited

    def after_evaluation(self, results: dict[str, float], rank: float) -> Position:
        """The position with the results of an evaluation at it."""
        better = self.best_rank is None or rank < self.best_rank
        return dataclasses.replace(
            self,
            evaluation=results,
            best_rank=rank if better else self.best_rank,
            waited=0 if better else self.waited + 1,
        )

    def check_partial_update(self, micro_batch_size: int, stops_within: bool) -> None:
        """Raises UserError where the run, as it is configured now, cannot finish the update under way.

        micro_batch_size  sequences of a micro-step now
        stops_within      whether the engine can go on in the middle of an update
        """
        partial = self.partial_update
        if partial is None:
            return
        stopped = f"update {self.update + 1} was stopped after {len(partial.metrics)} of {partial.steps} micro-steps"
        if partial.micro_batch_size != micro_batch_size:
            raise UserError(
                f"{stopped} of {partial.micro_batch_size} sequences, but now a micro-step has {micro_batch_size}; "
                f"resume with compute.micro_batch_size={partial.micro_batch_size} until the next checkpoint"
            )
        if not stops_within:
            raise UserError(
                f"{stopped}, from where this compute.engine cannot go on; resume with "
                "compute.engine=in_place until the next checkpoint"
            )

    def to_meta(self) -> dict[str, Any]:
        """The position as plain values that JSON keeps exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Position:
        """The position that a checkpoint's meta holds. Raises ValueError, which says why, where it holds none."""
        # Older versions named some fields otherwise, and did not know those of NEWER.
        meta = {new: meta[old] for new, old in OLD_KEYS.items() if old in meta} | NEWER | meta
        fields = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in fields if name not in meta]:
            raise ValueError(f"{missing[0]} is missing")
        values = {name: meta[name] for name in fields}
        for name in ("update", "cursor", "tokens", "before", "waited"):
            if type(values[name]) is not int or values[name] < 0:
                raise ValueError(f"{name}={values[name]!r} is not a whole number from 0")
        if type(values["seconds"]) not in (int, float):
            raise ValueError(f"seconds={values['seconds']!r} is not a number")
        if type(values["best_rank"]) not in (int, float, type(None)):
            raise ValueError(f"best_rank={values['best_rank']!r} is not a number")
        if not isinstance(values["evaluation"], dict | None):
            raise ValueError(f"evaluation={values['evaluation']!r} is not a set of results")
        values["histories"] = _read_histories(values["histories"])
        values["partial_update"] = _read_partial_update(values["partial_update"])
        return cls(**values)


def _read_histories(saved: Any) -> tuple[History, History] | None:
    if saved is None:
        return None
    try:
        first, second = saved
        return History.from_dict(first), History.from_dict(second)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("histories is not what was observed of two updates") from None


def _read_partial_update(saved: Any) -> PartialUpdateRecord | None:
    if saved is None:
        return None
    try:
        return PartialUpdateRecord(**{**saved, "metrics": tuple(saved["metrics"])})
    except (KeyError, TypeError, AttributeError):
        raise ValueError("partial_update is not an update under way") from None
