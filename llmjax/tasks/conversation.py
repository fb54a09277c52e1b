"""Dialogue: the model reads whole conversations and learns what the assistant says in them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.data.chat.formats import FORMATS
from llmjax.errors import choose
from llmjax.models.contract import Model
from llmjax.ranges import Unset
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals, token_loss, token_scores
from llmjax.tasks.language_model import next_tokens


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
    """The keys of the section `conversation`, explained in `configs/base.py`."""

    format: Annotated[str, Unset("auto")]
    system: Annotated[str, Unset("")]

    def __post_init__(self) -> None:
        choose(FORMATS, "conversation.format", self.format)


class Conversation:
    """The loss is the cross-entropy of what the assistant says: everything else has weight 0."""

    section = ConversationConfig
    sees_both_sides = False
    use = "chat"
    compresses_text = False

    scores = (
        Score("loss", "held-out loss of answers", "nats per token", digits=4),
        Score("perplexity", "perplexity", digits=2),
        Score("accuracy", "tokens foreseen", higher_is_better=True, digits=4),
    )

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        return token_loss(model, setting, next_tokens)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """`loss` is in nats per token of the assistant, and `perplexity` its exponential. `accuracy` is the share of
        these tokens that are the model's most likely ones after the right ones before them."""
        return token_scores(totals)
