"""What a task must know of the ids of a tokenizer: which of them are text, and where words begin."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids of a tokenizer, as arrays.

    mask_id        the id that stands for a masked token
    is_text_V      bool [V], whether an id stands for text, as neither special nor reserved ids do
    begins_word_V  bool [V], whether a token of this id begins a word. A word is a run of letters and digits with the
                   space before it, and each piece of Chinese text or of punctuation is one
    """

    mask_id: int
    is_text_V: np.ndarray
    begins_word_V: np.ndarray

    @property
    def text_ids(self) -> np.ndarray:
        """int32 [n], the ids that stand for text."""
        return np.flatnonzero(self.is_text_V).astype(np.int32)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer. UserError if it has no piece of its own for a mask."""
    if tokenizer.mask_id == tokenizer.unk_id:
        raise UserError(
            "the tokenizer has no piece <mask>, which a masked token is read as; leave tokenizer.path empty to train "
            "one that has it"
        )
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.unk_id}
    special.update(tokenizer.reserved_ids)
    pieces = [tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size)]
    is_text = [i not in special and bool(piece) for i, piece in enumerate(pieces)]
    return Vocabulary(
        tokenizer.mask_id, np.array(is_text), np.array([begins_word(piece) for piece in pieces])
    )


def words_without_text(vocab_size: int) -> Vocabulary:
    """A vocabulary for programs that are only planned, before there is a tokenizer: every id but 0 is a word."""
    is_text = np.arange(vocab_size) > 0
    return Vocabulary(0, is_text, np.ones(vocab_size, bool))


def begins_word(piece: bytes) -> bool:
    """Whether a piece of text with these bytes begins a word.

    A piece goes on with the word before it if its first character is a letter or digit of an alphabet, or if it begins
    within a character. A special id, which has no bytes, is a word of its own.
    """
    if not piece:
        return True
    # The bytes 0x80 to 0xBF go on with a character of UTF-8.
    if 0x80 <= piece[0] < 0xC0:
        return False
    first = piece.decode("utf-8", "replace")[0]
    # str.isalnum is true of Chinese characters as well, of which each piece is a word.
    return not first.isalnum() or is_ideograph(first)


def is_ideograph(character: str) -> bool:
    """Whether a character is a Chinese one, or one of the scripts written without spaces beside it."""
    code = ord(character)
    return 0x3040 <= code < 0xA000 or 0xF900 <= code < 0xFB00 or 0x20000 <= code < 0x32000
