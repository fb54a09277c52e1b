"""The tokenizer that belongs to weights from elsewhere, with as many ids as the weights have embeddings."""

from __future__ import annotations

import pathlib

from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer
from llmjax.data.tokenizer.llama2c_vocabulary import as_model
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.model_file import with_more_ids
from llmjax.data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError


def tokenizer_for(path: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer at `path` for a model with `vocab_size` embeddings.

    path  what `load_tokenizer` reads, or a tokenizer of llama2.c (.bin)

    A tokenizer with fewer ids gets more, which no text gives. Raises UserError if it has more, or cannot be read.
    """
    if path.suffix == ".bin":
        try:
            return SentencePieceTokenizer(as_model(path.read_bytes(), vocab_size))
        except (OSError, ValueError, RuntimeError) as why:
            raise UserError(
                f"{path} is no tokenizer of llama2.c with {vocab_size} pieces ({why}); give the one of the model"
            ) from None
    tokenizer = load_tokenizer(path)
    whole = _with_ids(path, tokenizer, vocab_size)
    whole.chat_template = tokenizer.chat_template
    return whole


def _with_ids(path: pathlib.Path, tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """`tokenizer` with so many ids."""
    missing = vocab_size - tokenizer.vocab_size
    if missing == 0:
        return tokenizer
    if missing > 0 and isinstance(tokenizer, JsonTokenizer):
        return JsonTokenizer(tokenizer.definition, tokenizer.special, vocab_size)
    if missing < 0 or not isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} ids, and the model {vocab_size} embeddings; give the "
            "tokenizer of the model"
        )
    return SentencePieceTokenizer(with_more_ids(tokenizer.model, missing))
