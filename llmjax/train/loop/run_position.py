"""How far a run has come: what a checkpoint says beside its arrays, and all that the host remembers."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmjax.errors import UserError
from llmjax.train.steering.steering import History


@dataclasses.dataclass(frozen=True)
class OpenWindow:
    """An update that was stopped between two of its micro-steps.

    steps             its k, whatever is configured now
    micro_batch_size  of its micro-steps
    metrics           of the micro-steps done
    """

    steps: int
    micro_batch_size: int
    metrics: tuple[dict[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Position:
    """Saved with every checkpoint.

    update      optimizer updates done
    cursor      packed sequences consumed
    tokens      positions trained on, padding included: what schedules follow. Behind the cursor once data was left out
    before      the same before the last update
    seconds     wall time spent
    evaluation  the held-out results at this very update, if it was evaluated
    histories   observed up to the last update but one, and up to the last; None at the start
    window      the update that is under way; None between updates
    owes        whether statistics, evaluation or samples that are due at this update are still to be made
    """

    update: int = 0
    cursor: int = 0
    tokens: int = 0
    before: int = 0
    seconds: float = 0.0
    evaluation: dict[str, float] | None = None
    histories: tuple[History, History] | None = None
    window: OpenWindow | None = None
    owes: bool = False

    def check_window(self, micro_batch_size: int, stops_within: bool) -> None:
        """UserError where the update that is under way cannot be gone on with as the run is now configured."""
        window = self.window
        if window is None:
            return
        stopped = (
            f"update {self.update + 1} was stopped after {len(window.metrics)} of {window.steps} micro-steps"
        )
        if window.micro_batch_size != micro_batch_size:
            raise UserError(
                f"{stopped} of {window.micro_batch_size} sequences, but now a micro-step has {micro_batch_size}; "
                f"resume with compute.micro_batch_size={window.micro_batch_size} until the next checkpoint"
            )
        if not stops_within:
            raise UserError(
                f"{stopped}, from where this compute.engine cannot go on; resume with "
                "compute.engine=in_place until the next checkpoint"
            )

    def to_meta(self) -> dict[str, Any]:
        """Plain values that JSON keeps exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Position:
        """The position that a checkpoint's meta holds; ValueError, saying why, where it holds none."""
        fields = [field.name for field in dataclasses.fields(cls) if field.name != "owes"]
        if missing := [name for name in fields if name not in meta]:
            raise ValueError(f"{missing[0]} is missing")
        # A checkpoint of an older version owes nothing.
        values = {name: meta[name] for name in fields} | {"owes": meta.get("owes", False)}
        for name in ("update", "cursor", "tokens", "before"):
            if type(values[name]) is not int or values[name] < 0:
                raise ValueError(f"{name}={values[name]!r} is not a whole number from 0")
        if type(values["seconds"]) not in (int, float):
            raise ValueError(f"seconds={values['seconds']!r} is not a number")
        if not isinstance(values["evaluation"], dict | None):
            raise ValueError(f"evaluation={values['evaluation']!r} is not a set of results")
        try:
            if values["histories"] is not None:
                first, second = values["histories"]
                values["histories"] = History.from_dict(first), History.from_dict(second)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError("histories is not what was observed of two updates") from None
        try:
            if values["window"] is not None:
                window = values["window"]
                values["window"] = OpenWindow(**{**window, "metrics": tuple(window["metrics"])})
        except (KeyError, TypeError, AttributeError):
            raise ValueError("window is not an update under way") from None
        return cls(**values)
