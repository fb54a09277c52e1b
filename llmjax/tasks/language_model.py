"""Next-token prediction: the model predicts every token of a document from the tokens before it."""

from __future__ import annotations

import math

import jax

from llmjax.models.contract import Model
from llmjax.ops.losses.cross_entropy import softmax_cross_entropy
from llmjax.scores import Score
from llmjax.tasks.contract import Loss, Setting, Totals, with_penalties
from llmjax.types import Batch, LossSums, Params


class LanguageModel:
    """The loss is the cross-entropy of every token of the documents, end-of-document tokens included."""

    section = None
    sees_both_sides = False
    compresses_text = True

    scores = (
        Score("loss", "held-out loss", "nats per token", digits=4),
        Score("perplexity", "perplexity", digits=2),
        Score("bits_per_byte", "bits per byte"),
    )

    def make_loss(
        self,
        model: Model,
        setting: Setting,
        *,
        z_loss: float,
        shards: tuple[int, int] = (1, 1),
        vocab_shards: int = 1,
    ) -> Loss:
        return make_loss(
            model, z_loss=z_loss, shards=shards, vocab_shards=vocab_shards, training=setting.training
        )

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """Computes the scores and the mean of every metric.

        `loss` is in nats per target and `perplexity` is its exponential. `bits_per_byte` is the total loss in bits over
        the bytes of the text. Unlike the other two it can be compared between tokenizers.
        """
        loss = totals.loss / totals.weight
        return {
            "loss": loss,
            # math.exp overflows above 709.
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": totals.loss / math.log(2) / totals.num_bytes,
            **{name: total / totals.weight for name, total in totals.metrics.items()},
        }


def make_loss(
    model: Model,
    *,
    z_loss: float,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
    training: bool = True,
) -> Loss:
    """Returns the cross-entropy of the next token as a function loss(params, batch, rng) -> LossSums.

    The metrics of the result are `accuracy`, the summed weight of the targets that are the model's most likely token,
    if `z_loss` is positive, `z_loss`, the sum of that loss term, and in training the sums of the terms that the model
    adds, such as the load balance of experts. Only `objective` contains these terms, not `loss`.

    Args:
      model: computes the hidden states and has the head for the logits.
      z_loss: the weight of the additional loss term log(Z)**2, where Z is the softmax normaliser; 0 in evaluations.
      shards: the numbers of devices over which the batch B and the positions T are split.
      vocab_shards: the number of devices over which the vocabulary V is split.
      training: whether the terms that the model adds are part of the loss.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None) -> LossSums:
        output = model.apply(params, batch, rng=rng)
        # The loss takes hidden states and head: it computes the logits in chunks and never holds all of them.
        sums = softmax_cross_entropy(
            output.hidden_BTD,
            model.head(params),
            batch.targets,
            batch.weights,
            z_loss=z_loss,
            shards=shards,
            vocab_shards=vocab_shards,
        )
        return with_penalties(sums, output, batch.weights) if training else sums

    return loss
