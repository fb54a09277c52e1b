"""One update's numbers from those of its micro-steps: exact sums, added in float64 and divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from llmjax.train.steering.steering import Measured
from llmjax.train.update.engine import MicroMetrics

OF_THE_UPDATE = ("is_update", "applied", "mean_loss", "grad_norm", "square_total")  # of the last micro-step
OF_THE_PARTS = ("square_norm", "weight_square", "parts", "dropped")


def total(steps: Sequence[MicroMetrics], name: str) -> float:
    """The sum over micro-steps."""
    return math.fsum(step[name] for step in steps)


def measure(steps: Sequence[MicroMetrics]) -> Measured:
    """What steering wants to know of an update."""
    last = steps[-1]
    return Measured(
        steps=len(steps),
        weight=total(steps, "weight"),
        weight_square=total(steps, "weight_square"),
        square_norm=total(steps, "square_norm"),
        mean_loss=last["mean_loss"],
        grad_norm=last["grad_norm"],
        square_total=last["square_total"],
        applied=last["applied"] == 1,
    )


def mean_metrics(steps: Sequence[MicroMetrics]) -> dict[str, float]:
    """What is recorded: each sum divided by the total of its own weight, or NaN where that is 0; and the gradient norm.

    `<term>_weight` is the weight of a sum `<term>`, `weight` that of all others.
    """
    values = {"grad_norm": steps[-1]["grad_norm"]}
    for name in sorted(steps[0]):
        own = f"{name}_weight"
        is_weight = name == "weight" or name.endswith("_weight")
        if is_weight or name in OF_THE_UPDATE + OF_THE_PARTS:
            continue
        weight = total(steps, own if own in steps[0] else "weight")
        values[name] = total(steps, name) / weight if weight else math.nan
    return values


# By the kind of a spike, the size of a micro-step's part in it.
SHARE_IN_SPIKE: dict[str, Callable[[MicroMetrics], float]] = {
    "loss": lambda step: step["loss"] / step["weight"],
    "gradient norm": lambda step: step["square_norm"] / step["weight"] ** 2,
}


def worst_micro_step(steps: Sequence[MicroMetrics], kind: str) -> int:
    """Which micro-step has the largest mean loss, or for a gradient spike the largest mean gradient."""

    def size(step: MicroMetrics) -> float:
        return SHARE_IN_SPIKE[kind](step) if step["weight"] else -math.inf

    return max(range(len(steps)), key=lambda i: size(steps[i]))
