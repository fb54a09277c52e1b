"""The contract for the device half of a task: its loss, as sums, and the scores of an evaluation, made of sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from llmjax.data.tokenizer.vocabulary import Vocabulary
from llmjax.models.contract import Model
from llmjax.scores import Score
from llmjax.types import Batch, LossSums, Output, Params

# loss(params, batch, rng) -> LossSums. Without `rng` the model runs without dropout.
Loss = Callable[[Params, Batch, jax.Array | None], LossSums]


@dataclasses.dataclass(frozen=True)
class Totals:
    """The sums of an evaluation over all held-out targets, as Python floats.

    loss       the sum of weight * loss, in nats
    weight     the sum of the weights of the targets
    metrics    further sums over the same targets, by name, as in `LossSums`
    num_bytes  the UTF-8 bytes of the held-out text
    """

    loss: float
    weight: float
    metrics: Mapping[str, float]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a task is told when its loss is made.

    keys        the task's own section of the config, if it has one
    seed        the seed of the run
    vocabulary  the ids of the tokenizer, for a task that replaces tokens; None where nobody knows them
    training    whether the loss is trained on, and has the terms that a model adds to it (`Output.penalties`)
    """

    keys: Any = None
    seed: int = 0
    vocabulary: Vocabulary | None = None
    training: bool = True


def with_penalties(sums: LossSums, output: Output, weights_BT: jax.Array) -> LossSums:
    """`sums`, whose objective and metrics also have what the model adds to every token, weighted by `weights_BT`.

    Loss terms of the model that have a weight of their own are put beside the main one.
    """
    added = {name: jnp.sum(x_BT * weights_BT) for name, x_BT in output.penalties.items()}
    objective = sum(added.values(), sums.main) if added else sums.objective
    return dataclasses.replace(
        sums,
        objective=objective,
        metrics=sums.metrics | added,
        auxiliary=sums.auxiliary | output.auxiliary,
    )


class Task(Protocol):
    """The device half of a task: what the model is trained for. The host half is in `data/examples/`."""

    @property
    def section(self) -> type | None:
        """The dataclass of the section of the config that has the name of the task; None if it has no keys."""

    @property
    def sees_both_sides(self) -> bool:
        """Whether the model may see the tokens after one that it predicts. If not, it must not."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores of an evaluation. The first score decides which checkpoint is the best."""

    @property
    def compresses_text(self) -> bool:
        """Whether the held-out loss is the length of the held-out text under an ideal code, as is the output of gzip.

        This holds if every token of the text is a target once.
        """

    def make_loss(
        self,
        model: Model,
        setting: Setting,
        *,
        z_loss: float,
        shards: tuple[int, int] = (1, 1),
        vocab_shards: int = 1,
    ) -> Loss:
        """Returns the loss function of this task, loss(params, batch, rng) -> LossSums.

        Args:
          model: computes the hidden states and has the head for the logits.
          setting: the keys of the task, the seed and the vocabulary.
          z_loss: the weight of the additional loss term log(Z)**2, where Z is the softmax normaliser; 0 in evaluations.
          shards: the numbers of devices over which the batch B and the positions T are split.
          vocab_shards: the number of devices over which the vocabulary V is split.
        """

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """Computes the value of every score, and of further metrics, by name."""
