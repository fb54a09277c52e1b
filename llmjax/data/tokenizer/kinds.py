"""The kinds of tokenizers, and the `tokenizer` section of the config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.tokenizer import NUM_BYTES, SPECIAL_PIECES, Tokenizer
from llmjax.errors import UserError, choose
from llmjax.ranges import Range, check_ranges

# The most bytes that a unigram model is trained on. A choice: the time grows faster than the text. 12 MB take 5 times
# as long as 4 MB, for a model that is no better.
_UNIGRAM_BYTES = 4_000_000
# Ids of a trained vocabulary beside the special, reserved and byte pieces, at least. A choice: SentencePiece fails
# without any.
_LEAST_LEARNED = 8


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one value of `tokenizer.kind` means.

    words       the name of the kind in words
    most_bytes  the most bytes of text that it is trained on
    fixed       for a tokenizer that is not trained, a function (num_reserved) that makes it. For None, SentencePiece
                trains a model of the type that has the same name as the kind
    """

    words: str
    most_bytes: float = math.inf
    fixed: Callable[[int], Tokenizer] | None = None

    @property
    def trained(self) -> bool:
        """Whether the tokenizer is trained on the corpus."""
        return self.fixed is None


# The table of all kinds, by tokenizer.kind.
KINDS = {
    "bpe": Kind("SentencePiece BPE"),
    "unigram": Kind("SentencePiece unigram", most_bytes=_UNIGRAM_BYTES),
    "byte": Kind("bytes", fixed=ByteTokenizer),
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The `tokenizer` section of the config: how text becomes tokens.

    kind                bpe (byte pair encoding), unigram (slower to train), or byte (the 256 bytes, for tests)
    path                an existing tokenizer to use, and then nothing is trained: whatever `load_tokenizer` reads
    vocab_size          the number of ids, special and byte pieces included. The kind byte ignores it
    train_bytes         how many bytes of text are sampled for training. unigram takes at most 4 MB of them
    character_coverage  the share of the text whose characters get an id each. Rarer characters are spelled in bytes. At
                        most half of the free ids are single characters, which leaves room for words even in Chinese
    num_reserved        the number of ids `<reserved_0>`, `<reserved_1>`, ... that no text gives. They are free for
                        later use, for example to mark turns of a dialogue

    Raises `UserError` if a value is out of range, or if `vocab_size` has no room for learned pieces.
    """

    kind: str
    path: str
    vocab_size: Annotated[int, Range(1, 2**24)]
    train_bytes: Annotated[int, Range(1, 2**40)]
    character_coverage: Annotated[float, Range(0, 1, above=True)]
    num_reserved: Annotated[int, Range(0, 2**20)]

    def __post_init__(self):
        choose(KINDS, "tokenizer.kind", self.kind)
        check_ranges("tokenizer", self)
        smallest = smallest_vocabulary(self)
        if KINDS[self.kind].trained and not self.path and self.vocab_size < smallest:
            raise UserError(
                f"tokenizer.vocab_size = {self.vocab_size} leaves no room beside the special and "
                f"byte pieces: use at least {smallest}."
            )


def smallest_vocabulary(config: TokenizerConfig) -> int:
    """The smallest vocab_size with which a tokenizer can be trained."""
    return len(SPECIAL_PIECES) + config.num_reserved + NUM_BYTES + _LEAST_LEARNED
