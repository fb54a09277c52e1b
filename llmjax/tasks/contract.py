"""The contract for the device half of a task: its loss, as sums, and the scores of an evaluation, made of sums."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from llmjax.data.tokenizer.vocabulary import Vocabulary
from llmjax.models.contract import Model
from llmjax.ops.losses.cross_entropy import softmax_cross_entropy
from llmjax.ops.losses.label_smoothing import smoothing_sum
from llmjax.scores.score import Score
from llmjax.types import Batch, LossSums, Output, Params

# loss(params, batch, rng) -> LossSums. Without `rng` the model runs without dropout.
Loss = Callable[[Params, Batch, jax.Array | None], LossSums]


@dataclasses.dataclass(frozen=True)
class Totals:
    """The sums of an evaluation over all held-out targets, as Python floats.

    loss       the sum of weight * loss, in nats
    weight     the sum of the weights of the targets
    metrics    further sums over the same targets, by name, as in `LossSums`; arrays become float64 arrays of numpy
    num_bytes  the UTF-8 bytes of the held-out text
    """

    loss: float
    weight: float
    metrics: Mapping[str, Any]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a task is told when its loss is made.

    keys          the task's own section of the config, if it has one
    seed          the seed of the run
    vocabulary    gives the ids of the tokenizer, to a task that replaces tokens; None where nobody knows them
    training      whether the loss is trained on, and has the terms that a model adds to it (`Output.penalties`)
    z_loss        the weight of the loss term log(Z)**2, where Z is the softmax normaliser; 0 in evaluations
    shards        the numbers of devices over which the batch B and the positions T are split
    vocab_shards  the number of devices over which the vocabulary V is split
    sees_both_sides  whether the model sees the tokens after each token
    """

    keys: Any = None
    seed: int = 0
    vocabulary: Callable[[], Vocabulary] | None = None
    training: bool = True
    z_loss: float = 0.0
    shards: tuple[int, int] = (1, 1)
    vocab_shards: int = 1
    sees_both_sides: bool = False


# batch -> (the batch as the model reads it, targets_BT, weights_BT)
Prepare = Callable[[Batch], tuple[Batch, jax.Array, jax.Array]]


def token_loss(model: Model, setting: Setting, prepare: Prepare, label_smoothing: float = 0.0) -> Loss:
    """Returns the cross-entropy of the tokens that `prepare` asks for, as loss(params, batch, rng) -> LossSums.

    The metrics of the result are `accuracy`, the summed weight of the targets that are the model's most likely token,
    `z_loss` if there is one, the sum of that loss term, and in training the sums of the terms that the model adds, such
    as the load balance of experts and label smoothing. Only `objective` contains these terms, not `loss`.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None) -> LossSums:
        batch, targets_BT, weights_BT = prepare(batch)
        output, head = model.apply(params, batch, rng=rng), model.head(params)
        # The loss takes hidden states and head: it computes the logits in chunks and never holds all of them.
        sums = softmax_cross_entropy(
            output.hidden_BTD,
            head,
            targets_BT,
            weights_BT,
            z_loss=setting.z_loss,
            shards=setting.shards,
            vocab_shards=setting.vocab_shards,
        )
        if not setting.training:
            return sums
        sums = with_penalties(sums, output, weights_BT)
        if not label_smoothing:
            return sums
        added = smoothing_sum(output.hidden_BTD, head, targets_BT, weights_BT, label_smoothing)
        return dataclasses.replace(
            sums, objective=sums.main + added, metrics=sums.metrics | {"label_smoothing": added}
        )

    return loss


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


def token_scores(totals: Totals) -> dict[str, float]:
    """`loss` in nats per target, `perplexity`, which is its exponential, and the mean of every metric."""
    loss = totals.loss / totals.weight
    figures = {name: total / totals.weight for name, total in totals.metrics.items()}
    # math.exp overflows above 709.
    return {**figures, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class Task(Protocol):
    """The device half of a task: what the model is trained for. The host half is in `data/examples/`."""

    @property
    def section(self) -> type | None:
        """The dataclass of the section of the config that has the name of the task; None if it has no keys."""

    @property
    def sees_both_sides(self) -> bool | None:
        """Whether the model may see the tokens after one that it predicts. If not, it must not. None if the task
        predicts no token, so that any model will do."""

    @property
    def use(self) -> str:
        """What a trained model is used for, which decides what its samples are and which mode uses it.

        It is `generate` to continue a text, `fill_masks`, `fill_spans`, `classify` to label a text, `translate` to
        write a text after another was read, or `chat` to answer in a conversation.
        """

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores of an evaluation. The first score decides which checkpoint is the best."""

    @property
    def compresses_text(self) -> bool:
        """Whether the held-out loss is the length of the held-out text under an ideal code, as is the output of gzip.

        This holds if every token of the text is a target once.
        """

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        """Returns the loss function of this task for a model, loss(params, batch, rng) -> LossSums."""

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """Computes the value of every score, and of further metrics, by name."""


@runtime_checkable
class AddsParameters(Protocol):
    """A task whose model has parameters that models of other tasks lack, such as a head for classes."""

    @property
    def added(self) -> tuple[str, ...]:
        """The entries of the tree of parameters that the task adds."""

    def make_model(self, model: Model, keys: Any, init_std: float) -> Model:
        """The model of the task: `model` with further parameters. `keys` is the section of the task."""


@runtime_checkable
class ReadsPairs(Protocol):
    """A task whose second stream is a text like the first one: the model reads both, each by itself."""

    def has_reference(self, keys: Any) -> bool:
        """Whether the loss compares the model with the one that the run began with. `keys` is the section of the task.

        `params` of the loss then have an entry `models/reference.py: REFERENCE` with its parameters.
        """


@runtime_checkable
class HasDetails(Protocol):
    """A task whose evaluation gives more than scores, such as a confusion matrix."""

    def details(self, totals: Totals, keys: Any) -> dict[str, Any]:
        """What the report shows besides the scores, as JSON holds it. `keys` is the section of the task."""
