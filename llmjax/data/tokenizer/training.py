"""Trains a tokenizer on a sample of the corpus.

SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226) is trained so that it loses nothing: no normalization, no
space put before a text, all whitespace kept, and byte pieces for characters that have no piece of their own.

Pieces may go from letters on to punctuation and line ends: `split_by_unicode_script` is off, and a newline is a
character like others. On the second halves of the standard library and of a Chinese novel, with models trained on the
first halves, this gave 7 to 9 percent fewer tokens.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from llmjax.data.tokenizer.kinds import KINDS, TokenizerConfig, smallest_vocabulary
from llmjax.data.tokenizer.passages import sample_passages, trainable
from llmjax.data.tokenizer.sentencepiece_tokenizer import LOG_LEVEL, SentencePieceTokenizer
from llmjax.data.tokenizer.tokenizer import NUM_BYTES, SPECIAL_PIECES, Tokenizer
from llmjax.errors import UserError

# Decides whether a cached tokenizer is trained again. The number 1 is to be raised if the same text would give another
# model.
TRAINER_VERSION = f"1 {sentencepiece.__version__}"
# The sums of unigram training depend on the number of threads, so it is the same on every machine.
_NUM_THREADS = 4
# SentencePiece leaves out longer sentences, in bytes. All passages are far shorter.
_MAX_SENTENCE_BYTES = 1 << 24


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str | Iterable[str]]) -> Tokenizer:
    """Trains a tokenizer on a sample of the texts, or makes one of a kind that is not trained.

    The same texts in any order give the same model on every machine. `config.path` is ignored, see `load_tokenizer`.

    Args:
      config: the `tokenizer` section.
      texts: the texts, each whole or as an iterable of its chunks. They are read once, and about `config.train_bytes`
        of them are kept.

    Raises `UserError` if there is no text, or not enough for the vocabulary. The error names the largest vocabulary
    that would do.
    """
    kind = KINDS[config.kind]
    if kind.fixed is not None:
        return kind.fixed(config.num_reserved)
    sample = sample_passages(texts, min(config.train_bytes, kind.most_bytes))
    if not sample:
        raise UserError("data.sources hold no text to train the tokenizer on: name sources with text.")
    model, fitting = _train_model(config, sample)
    if model is not None:
        return SentencePieceTokenizer(model)
    # The size that SentencePiece names is a first guess: with a smaller vocabulary fewer characters get an id, and then
    # there is less to fill it with. So smaller sizes are tried until one works.
    while model is None and fitting >= smallest_vocabulary(config):
        largest = fitting
        model, fitting = _train_model(dataclasses.replace(config, vocab_size=largest), sample)
    advice = "no smaller one would do: add text, or set tokenizer.kind to byte"
    if model is not None:
        advice = f"{largest} would do: use at most {largest}, or more text"
    raise UserError(
        f"tokenizer.vocab_size = {config.vocab_size} is more than this corpus can fill, and {advice}."
    )


def _train_model(config: TokenizerConfig, sample: Sequence[str]) -> tuple[bytes | None, int]:
    """Trains a SentencePiece model on the passages of `sample`.

    Returns the bytes of the .model file and its number of ids. If the sample is too small for `config.vocab_size`,
    returns None and the largest number of ids that SentencePiece offers, or 0 if it names none.
    """
    reserved = [f"<reserved_{i}>" for i in range(config.num_reserved)]
    free = config.vocab_size - len(SPECIAL_PIECES) - config.num_reserved - NUM_BYTES
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(trainable(sample, config.character_coverage, free // 2)),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            # `trainable` has chosen the characters already, so all that are left are covered.
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            split_digits=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=SPECIAL_PIECES[0],
            bos_piece=SPECIAL_PIECES[1],
            eos_piece=SPECIAL_PIECES[2],
            unk_piece=SPECIAL_PIECES[3],
            control_symbols=[SPECIAL_PIECES[4], *reserved],
            max_sentence_length=_MAX_SENTENCE_BYTES,
            minloglevel=LOG_LEVEL,
            num_threads=_NUM_THREADS,
        )
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        return None, int(largest[1]) if largest else 0
    return model.getvalue(), config.vocab_size
