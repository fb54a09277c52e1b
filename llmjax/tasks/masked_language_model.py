"""Masked language modelling (Devlin et al. 2018): the model sees the tokens on both sides of those that it predicts.

Which tokens are masked is a function of the seed, the packed sequence number and the column, as dropout is. It does not
depend on how the batch was cut, and a sequence that comes again in another epoch has another number and other masks.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from llmjax.data.tokenizer.vocabulary import Vocabulary
from llmjax.errors import UserError
from llmjax.models.contract import Model
from llmjax.ops.dropout import token_keys
from llmjax.ops.seeds import make_key
from llmjax.ranges import Range, Unset, check_ranges
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals, token_loss, token_scores
from llmjax.types import Batch

# What the draws of a token are told apart by.
SELECT, ACT, REPLACE = range(3)
# What the seed of the masks is folded with, so that they do not repeat the draws of dropout.
MASKS = 0x6D61736B


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelConfig:
    """The keys of the section `masked_language_model`, explained in `configs/base.py`."""

    rate: Annotated[float, Range(0, 1, above=True), Unset(0.15)]
    mask_share: Annotated[float, Range(0, 1), Unset(0.8)]
    random_share: Annotated[float, Range(0, 1), Unset(0.1)]
    whole_words: Annotated[bool, Unset(False)]

    def __post_init__(self) -> None:
        check_ranges("masked_language_model", self)
        # A sum of decimals may be a rounding above 1.
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise UserError(
                f"masked_language_model.mask_share={self.mask_share} and masked_language_model.random_share="
                f"{self.random_share} are more than 1 together; lower one of them"
            )


class MaskedLanguageModel:
    """The loss is the cross-entropy of the chosen tokens, given the others."""

    section = MaskedLanguageModelConfig
    sees_both_sides = True
    use = "fill_masks"
    compresses_text = False

    scores = (
        Score("loss", "held-out loss", "nats per masked token", digits=4),
        Score("perplexity", "perplexity of masked tokens", digits=2),
        Score("accuracy", "masked tokens found", higher_is_better=True, digits=4),
    )

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        if setting.vocabulary is None:
            raise ValueError("masked language modelling needs the vocabulary of the tokenizer")
        vocabulary = setting.vocabulary()

        def prepare(batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
            masked, chosen_BT = mask_tokens(batch, setting.keys, vocabulary, setting.seed)
            return masked, batch.tokens, chosen_BT.astype(jnp.float32)

        return token_loss(model, setting, prepare)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """`loss` is in nats per masked token, and `perplexity` its exponential. `accuracy` is the share of the masked
        tokens that are the model's most likely ones."""
        return token_scores(totals)


def mask_tokens(
    batch: Batch, keys: MaskedLanguageModelConfig, vocabulary: Vocabulary, seed: int
) -> tuple[Batch, jax.Array]:
    """The batch as the model reads it, and chosen_BT: bool, which of its tokens are to be predicted.

    Of the tokens that stand for text, `keys.rate` are chosen: `keys.mask_share` of them become the mask, and
    `keys.random_share` a random token. The others stay, so that the model cannot rely on a token that it sees. With
    `keys.whole_words`, all tokens of a word are chosen together.
    """
    columns_BT = batch.columns
    if columns_BT is None:
        columns_BT = jax.lax.broadcasted_iota(jnp.int32, batch.tokens.shape, 1)
    # Special tokens and padding are never chosen.
    is_text_BT = jnp.asarray(vocabulary.is_text_V)[batch.tokens] & (batch.segments > 0)
    rng = jax.random.fold_in(make_key(seed), MASKS)
    keys_BT = token_keys(rng, batch.index, columns_BT)
    # The tokens of a word share the draw of its first token.
    words_BT = keys_BT
    if keys.whole_words:
        words_BT = token_keys(rng, batch.index, _first_columns(batch, columns_BT, vocabulary))
    chosen_BT = is_text_BT & (_draw(words_BT, SELECT) < keys.rate)
    action_BT = _draw(keys_BT, ACT)
    text_ids = jnp.asarray(vocabulary.text_ids)
    number_BT = (_draw(keys_BT, REPLACE) * text_ids.size).astype(jnp.int32)
    random_BT = text_ids[jnp.minimum(number_BT, text_ids.size - 1)]
    read_BT = jnp.where(action_BT < keys.mask_share + keys.random_share, random_BT, batch.tokens)
    read_BT = jnp.where(action_BT < keys.mask_share, vocabulary.mask_id, read_BT)
    tokens_BT = jnp.where(chosen_BT, read_BT, batch.tokens).astype(batch.tokens.dtype)
    return dataclasses.replace(batch, tokens=tokens_BT), chosen_BT


def _draw(keys_BT: jax.Array, salt: int) -> jax.Array:
    """A number in [0, 1) for each token."""
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, salt))))(keys_BT)


def _first_columns(batch: Batch, columns_BT: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """The column of the first token of the word that each token belongs to."""
    order_BT = jnp.argsort(columns_BT, axis=1)

    def in_order(x_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BT, order_BT, axis=1)

    tokens_BT, segments_BT = in_order(batch.tokens), in_order(batch.segments)
    begins_BT = jnp.asarray(vocabulary.begins_word_V)[tokens_BT]
    # A special token and the beginning of a document end a word.
    others_BT = ~jnp.asarray(vocabulary.is_text_V)[tokens_BT]
    after_BT = jnp.pad(others_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    begins_BT |= others_BT | after_BT | (segments_BT != before_BT)
    numbers_BT = jax.lax.broadcasted_iota(jnp.int32, begins_BT.shape, 1)
    first_BT = jax.lax.cummax(jnp.where(begins_BT, numbers_BT, 0), axis=1)
    # Back to where each token lies.
    return jnp.take_along_axis(first_BT, columns_BT, axis=1)
