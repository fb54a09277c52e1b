"""Translation: the model reads a text and writes it in another language, or in any other form.

An encoder-decoder reads the text as a second stream. A decoder and a recurrent network read it before the translation,
in the same stream (`data/examples/translations.py`). What is learned is the translation alone.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.errors import UserError
from llmjax.models.contract import Model
from llmjax.ranges import Range, Unset, check_ranges
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals, token_loss, token_scores
from llmjax.tasks.language_model import next_tokens


@dataclasses.dataclass(frozen=True)
class TranslationConfig:
    """The keys of the section `translation`, explained in `configs/base.py`."""

    source_field: Annotated[str, Unset("source")]
    label_smoothing: Annotated[float, Range(0, 1, below=True), Unset(0.0)]

    def __post_init__(self) -> None:
        check_ranges("translation", self)
        if not self.source_field:
            raise UserError(
                "translation.source_field='' names no field; give the one that holds the text to translate"
            )


class Translation:
    """The loss is the cross-entropy of every token of the translations, end-of-document tokens included."""

    section = TranslationConfig
    sees_both_sides = False
    use = "translate"
    compresses_text = False

    scores = (
        Score("loss", "held-out loss", "nats per token", digits=4),
        Score("perplexity", "perplexity", digits=2),
        Score("accuracy", "tokens foreseen", higher_is_better=True, digits=4),
    )

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        return token_loss(model, setting, next_tokens, label_smoothing=setting.keys.label_smoothing)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """`loss` is in nats per token, without label smoothing, and `perplexity` its exponential. `accuracy` is the
        share of the tokens that are the model's most likely ones after the right ones before them."""
        return token_scores(totals)
