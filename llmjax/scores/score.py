"""Scores: their names, how they are shown, and which direction is better. Only tasks know scores by name."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

# The file in a workdir that describes the scores in its metrics.
FILE = "scores.json"


@dataclasses.dataclass(frozen=True)
class Score:
    """One score of an evaluation on held-out documents.

    name              its name in metrics.jsonl, such as bits_per_byte
    label             its name for people, such as "bits per byte"
    unit              the unit of its value, such as "nats per token"; may be empty
    higher_is_better  which direction is better
    digits            the digits after the decimal point
    """

    name: str
    label: str
    unit: str = ""
    higher_is_better: bool = False
    digits: int = 3

    def rank(self, value: float) -> float:
        """A number that is lower for better values."""
        return -value if self.higher_is_better else value

    def describe(self, value: float) -> str:
        """The value with its digits and unit."""
        return f"{value:.{self.digits}f} {self.unit}".strip()


def describe_scores(scores: Sequence[Score], values: Mapping[str, float]) -> dict[str, str]:
    """Label -> value as text, for those scores that `values` contains."""
    return {score.label: score.describe(values[score.name]) for score in scores if score.name in values}


def scores_as_json(scores: Sequence[Score]) -> str:
    """The content of `FILE` for these scores."""
    return json.dumps([dataclasses.asdict(score) for score in scores], indent=2) + "\n"


def read_scores(workdir: pathlib.Path) -> tuple[Score, ...]:
    """The scores of the run in `workdir`; an empty tuple if the file is missing (older versions did not write it) or
    damaged."""
    try:
        return tuple(Score(**values) for values in json.loads((workdir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return ()
