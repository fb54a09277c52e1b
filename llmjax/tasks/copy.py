"""The copy task: the model reads a document and writes it once more, which tests whether it can look up its context.

Induction heads copy text from the context (Olsson et al. 2022, arXiv 2209.11895). Recurrent models with a small state
cannot (Jelassi et al. 2024, "Repeat After Me", arXiv 2402.01032).
"""

from __future__ import annotations

import math

from llmjax.models.contract import Model
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals, token_loss
from llmjax.tasks.language_model import next_tokens


class Copy:
    """The loss is the cross-entropy of the copy alone: `data/examples/copies.py` gives the first text weight 0."""

    section = None
    sees_both_sides = False
    use = "generate"
    compresses_text = False

    scores = (
        Score("accuracy", "tokens copied", higher_is_better=True, digits=4),
        Score("loss", "held-out loss", "nats per token", digits=4),
    )

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        return token_loss(model, setting, next_tokens)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """`accuracy` is the share of targets that are the model's most likely token. `loss` is in nats per target."""
        # Accuracy is a share of targets, and would be a number even where nothing can be computed any more.
        if not math.isfinite(totals.loss):
            return dict.fromkeys((score.name for score in self.scores), math.nan)
        figures = {name: total / totals.weight for name, total in totals.metrics.items()}
        return {**figures, "loss": totals.loss / totals.weight}
