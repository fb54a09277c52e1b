"""Next-token prediction: the loss of a decoder on packed documents, as sums."""

from __future__ import annotations

import dataclasses
import math

import jax

from llmjax.models.contract import Model
from llmjax.ops.loss import softmax_cross_entropy
from llmjax.scores import Score
from llmjax.tasks.contract import Loss, Totals
from llmjax.types import Batch, LossSums, Params


class LanguageModel:
    """Next-token prediction on documents."""

    compresses_text = True

    scores = (
        Score("loss", "held-out loss", "nats per token", digits=4),
        Score("perplexity", "perplexity", digits=2),
        Score("bits_per_byte", "bits per byte"),
    )

    def make_loss(
        self, model: Model, *, z_loss: float, shards: tuple[int, int] = (1, 1), vocab_shards: int = 1
    ) -> Loss:
        return make_loss(model, z_loss=z_loss, shards=shards, vocab_shards=vocab_shards)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """Nats per target token and its exponential, and bits per byte of text, end-of-document tokens included."""
        loss = totals.loss / totals.weight
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": totals.loss / math.log(2) / totals.num_bytes,
            **{name: total / totals.weight for name, total in totals.metrics.items()},
        }


def make_loss(
    model: Model, *, z_loss: float, shards: tuple[int, int] = (1, 1), vocab_shards: int = 1
) -> Loss:
    """`loss(params, batch, rng) -> LossSums`; rng None means without dropout, and nothing else.

    The loss is the cross-entropy. metrics: `accuracy`, the summed weight of targets that are the most likely token, and
    with a z_loss `z_loss`, which only `objective` contains: evaluation asks for a loss with z_loss 0. The loss terms of
    the model's own are auxiliary. `shards`, `vocab_shards`: over how many devices B and T, and V, are split.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None) -> LossSums:
        output = model.apply(params, batch, rng=rng)
        sums = softmax_cross_entropy(
            output.hidden_BTD,
            model.head(params),
            batch.targets,
            batch.weights,
            z_loss=z_loss,
            shards=shards,
            vocab_shards=vocab_shards,
        )
        return dataclasses.replace(sums, auxiliary=sums.auxiliary | output.auxiliary)

    return loss
