"""What every tokenizer offers to the rest of llmjax, and what all of them share.

`kinds.py` is the table of the kinds of tokenizers, `training.py` trains one on a corpus, and `loading.py` reads a saved
one.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from llmjax.files import write_atomically

# The special pieces, in the order of their ids, which begin at 0.
SPECIAL_PIECES = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
# How many ids stand for single bytes.
NUM_BYTES = 256
# The files of a saved tokenizer: the SentencePiece model, if it is one, and what kind of tokenizer it is.
MODEL_FILE, META_FILE = "tokenizer.model", "tokenizer.json"
# The file beside a tokenizer that says how conversations are written, as Hugging Face names it.
TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer(Protocol):
    """What the rest of llmjax needs of a tokenizer. It is immutable, and it can be pickled.

    vocab_size     the number of ids, which go from 0 to vocab_size - 1
    pad_id         the id of padding, or `unk_id` if the model has no piece for it
    bos_id         the id of the beginning of a text, or `pad_id` if the model has no piece for it (T5 begins the texts
                   of its decoder with padding)
    eos_id         the id of the end of a text, or `bos_id` if the model has no piece for it
    mask_id        the id of a masked token, or `unk_id` if the model has no piece for it
    unk_id         the id of the unknown piece
    reserved_ids   ids that no text gives, free for later use
    lossless       whether `decode(encode(text)) == text` for every text
    text_prefix    what the model puts before every text, `b" "` or nothing. `decode` takes it off again
    strips_spaces  whether the model drops spaces at the beginning of a text
    prefixes_parts  whether the library of the tokenizer also puts `text_prefix` before what follows a special token
    fingerprint    a SHA-256 in hex. Tokenizers with equal fingerprints give equal ids
    chat_template  how a conversation is written as text, in Jinja; nothing if nobody has said it. No id depends on it
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int
    reserved_ids: tuple[int, ...]
    lossless: bool
    text_prefix: bytes
    strips_spaces: bool
    prefixes_parts: bool
    unk_id: int
    fingerprint: str
    chat_template: str

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a text, without bos and eos. Text that looks like a special piece is encoded as plain text.

        `continues` says that the text goes on after another one, as all but the first of `pieces` do.
        """

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cuts a long text, given in chunks, into pieces that can be encoded one by one.

        The ids of the pieces, joined, are those of the whole text.
        """

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """The text of the ids. Special ids have no text, and bytes that are not UTF-8 become U+FFFD.

        `continues` says that the ids go on after others, so that a space at their beginning belongs to the text.
        Raises IndexError if an id is not in the vocabulary.
        """

    def id_to_bytes(self, i: int) -> bytes:
        """The bytes that one id stands for. They may be part of a character, and none for a special id."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `load_tokenizer` reads into a folder, which is made if it does not exist."""


class StreamDecoder:
    """Decodes one id at a time. The texts that it returns, joined, are `tokenizer.decode` of all ids.

    Bytes of a character are held back until the character is complete. `continues` says that the ids go on after
    others, so that a space at their beginning belongs to the text.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Whether the next bytes may be spaces that the tokenizer put before the text.
        self._begins = not continues

    def push(self, i: int) -> str:
        """The characters that the id `i` completes: often one or several, sometimes none."""
        data = self._tokenizer.id_to_bytes(i)
        if data and self._begins:
            # The text of an unknown piece may begin with a space of its own, which SentencePiece keeps.
            if self._tokenizer.strips_spaces and i != self._tokenizer.unk_id:
                data = data.lstrip(b" ")
            else:
                data = data.removeprefix(self._tokenizer.text_prefix)
            self._begins = not data and self._tokenizer.strips_spaces
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What was held back, as U+FFFD, or nothing. It is called once, at the end."""
        return self._decoder.decode(b"", final=True)


def save_template(directory: str | os.PathLike, template: str) -> None:
    """Writes the chat template of a tokenizer beside it, if it has one."""
    if template:
        write_atomically(Path(directory) / TEMPLATE_FILE, template)


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as a list of Python integers. Raises IndexError if one does not lie in [0, vocab_size)."""
    ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise IndexError(f"token ids must lie in [0, {vocab_size}): got {ids.min()} to {ids.max()}")
    return ids.tolist()
