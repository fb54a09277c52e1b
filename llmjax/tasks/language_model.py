"""Next-token prediction: the model predicts every token of a document from the tokens before it."""

from __future__ import annotations

import math

import jax

from llmjax.models.contract import Model
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals, token_loss, token_scores
from llmjax.types import Batch


class LanguageModel:
    """The loss is the cross-entropy of every token of the documents, end-of-document tokens included."""

    section = None
    sees_both_sides = False
    use = "generate"
    compresses_text = True

    scores = (
        Score("loss", "held-out loss", "nats per token", digits=4),
        Score("perplexity", "perplexity", digits=2),
        Score("bits_per_byte", "bits per byte"),
    )

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        return token_loss(model, setting, next_tokens)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """Computes the scores and the mean of every metric.

        `loss` is in nats per target and `perplexity` is its exponential. `bits_per_byte` is the total loss in bits over
        the bytes of the text. Unlike the other two it can be compared between tokenizers.
        """
        return {**token_scores(totals), "bits_per_byte": totals.loss / math.log(2) / totals.num_bytes}


def next_tokens(batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
    """The batch as it is, with the token after each token as its target."""
    return batch, batch.targets, batch.weights
