"""The numbers of an update from the sums of its micro-steps, added in float64 and divided once by their weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from llmjax.train.steering.steering import Measured
from llmjax.train.update.engine import MicroMetrics

# Metrics of the whole update, see `accumulate.Outcome`. Only the last micro-step has them.
OF_THE_UPDATE = ("is_update", "applied", "mean_loss", "grad_norm", "square_total")
# Metrics for steering, which are not recorded.
OF_THE_PARTS = ("square_norm", "weight_square", "parts", "dropped")


def total(steps: Sequence[MicroMetrics], name: str) -> float:
    """The sum of a metric over micro-steps, with one rounding (`math.fsum`)."""
    return math.fsum(step[name] for step in steps)


def measure(steps: Sequence[MicroMetrics]) -> Measured:
    """The update as the steering is told of it."""
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
    """The metrics of an update for the record: the gradient norm, and each sum divided by the total of its weight.

    The weight of a sum `<term>` is `<term>_weight` where there is one, and `weight` otherwise. Where the total is 0,
    the mean is NaN.
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


# Kind of spike -> how much a micro-step contributed to it.
SHARE_IN_SPIKE: dict[str, Callable[[MicroMetrics], float]] = {
    "loss": lambda step: step["loss"] / step["weight"],
    "gradient norm": lambda step: step["square_norm"] / step["weight"] ** 2,
}


def worst_micro_step(steps: Sequence[MicroMetrics], kind: str) -> int:
    """The index of the micro-step with the largest mean loss or, for a spike of the gradient norm, mean gradient."""

    def size(step: MicroMetrics) -> float:
        return SHARE_IN_SPIKE[kind](step) if step["weight"] else -math.inf

    return max(range(len(steps)), key=lambda i: size(steps[i]))
