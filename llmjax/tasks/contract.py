"""What a task is on the devices' side: a loss as sums, and the scores that an evaluation makes of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import jax

from llmjax.models.contract import Model
from llmjax.scores import Score
from llmjax.types import Batch, LossSums, Params

Loss = Callable[[Params, Batch, jax.Array | None], LossSums]


@dataclasses.dataclass(frozen=True)
class Totals:
    """The sums of an evaluation over every held-out target, as Python floats.

    loss, weight, metrics  as in `LossSums`
    num_bytes              UTF-8 bytes of the held-out text
    """

    loss: float
    weight: float
    metrics: Mapping[str, float]
    num_bytes: int


class Task(Protocol):
    """What the model is trained for, on the devices' side. Its host side is `data/examples/`."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores of its evaluation; the first one says which checkpoint is the best."""

    @property
    def compresses_text(self) -> bool:
        """Whether the held-out loss is the length of the held-out text in an ideal code, as gzip's output is."""

    def make_loss(
        self, model: Model, *, z_loss: float, shards: tuple[int, int] = (1, 1), vocab_shards: int = 1
    ) -> Loss:
        """`loss(params, batch, rng) -> LossSums`; rng None means without dropout, and nothing else.

        `z_loss` is the weight of log(Z)^2, 0 in evaluations. `shards`, `vocab_shards`: over how many devices B and T,
        and V, are split.
        """

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """The value of every score by its name, and further metrics."""
