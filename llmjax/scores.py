"""What a score is: its name, what a person is told of it, and which way is better. Only tasks know one by name."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

FILE = "scores.json"  # in a workdir: what the scores of its evaluations are


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of an evaluation on held-out documents.

    name              in metrics.jsonl, such as bits_per_byte
    label             for people, such as "bits per byte"
    unit              of the value, such as "nats per token"; may be empty
    higher_is_better  which way is better
    digits            behind the point
    """

    name: str
    label: str
    unit: str = ""
    higher_is_better: bool = False
    digits: int = 3

    def rank(self, value: float) -> float:
        """A number of which the lowest is the best."""
        return -value if self.higher_is_better else value

    def describe(self, value: float) -> str:
        """The value with its digits and its unit."""
        return f"{value:.{self.digits}f} {self.unit}".strip()


def describe_scores(scores: Sequence[Score], values: Mapping[str, float]) -> dict[str, str]:
    """Label -> the value in words, of the scores that `values` has."""
    return {score.label: score.describe(values[score.name]) for score in scores if score.name in values}


def scores_as_json(scores: Sequence[Score]) -> str:
    """What is written into `FILE`."""
    return json.dumps([dataclasses.asdict(score) for score in scores], indent=2) + "\n"


def read_scores(workdir: pathlib.Path) -> tuple[Score, ...]:
    """The scores of the run in `workdir`; none where an older version wrote it, or the file cannot be read."""
    try:
        return tuple(Score(**values) for values in json.loads((workdir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return ()
