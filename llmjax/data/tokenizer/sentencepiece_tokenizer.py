"""SentencePiece models as tokenizers: text to ids and back without losing a character, if the model allows it.

SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226) cannot do two things by itself, and they are done around it.
First, the character U+2581 in a text would be taken for a space, which SentencePiece writes so; it is spelled in byte
pieces instead. Second, SentencePiece decodes whole texts only; here a table gives the bytes of each id, so that
`decode(encode(text)) == text` bit for bit, and ids can be decoded one at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from llmjax.data.tokenizer import cuts
from llmjax.data.tokenizer.cuts import LOOK_AHEAD, neighbours
from llmjax.data.tokenizer.model_file import (
    CONTROL,
    NO_DUMMY_PREFIX,
    NORMAL,
    as_control,
    is_unigram,
    piece_kinds,
)
from llmjax.data.tokenizer.passages import SPACE_MARK, check_unicode
from llmjax.data.tokenizer.tokenizer import (
    META_FILE,
    MODEL_FILE,
    NUM_BYTES,
    StreamDecoder,
    checked_ids,
    save_template,
)
from llmjax.files import write_atomically

# Only fatal errors of SentencePiece are logged. All others are raised as well.
LOG_LEVEL = 3
# Characters before which a text may be cut for a model that changes the text.
_SPACES = " \n"


class SentencePieceTokenizer:
    """A SentencePiece model as a `Tokenizer`, whether it was trained here or elsewhere.

    Args:
      model: the bytes of the .model file.

    Raises RuntimeError or ValueError if these are not a model.
    """

    chat_template = ""
    prefixes_parts = False

    def __init__(self, model: bytes):
        # `save` writes the model as it was given, whatever is changed below.
        self._model = model
        sentencepiece.set_min_log_level(LOG_LEVEL)
        given = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = given.vocab_size()
        pieces = {given.id_to_piece(i): i for i in range(self.vocab_size)}
        self.unk_id = given.unk_id()
        # The processor reads an empty file without an error.
        if self.unk_id < 0:
            raise ValueError("a SentencePiece model has an unknown piece")
        self.pad_id = _first_id(given.pad_id(), pieces.get("<pad>"), self.unk_id)
        self.bos_id = _first_id(given.bos_id(), self.pad_id)
        self.eos_id = _first_id(given.eos_id(), self.bos_id)
        self.mask_id = _first_id(pieces.get("<mask>"), pieces.get("[MASK]"), self.unk_id)
        taken = {self.pad_id, self.bos_id, self.eos_id, self.mask_id, self.unk_id}
        # Some models have a pad or mask piece that is like any other, so that a text with "<pad>" in it would give it.
        # Such pieces are turned into control symbols, which no text gives.
        spelled = [i for i in taken - {self.unk_id} if not (given.is_control(i) or given.is_unused(i))]
        if spelled:
            model = as_control(model, spelled)
            given = sentencepiece.SentencePieceProcessor(model_proto=model)
        # The same model without the space that many models put before every text.
        exact = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        self.reserved_ids = tuple(
            i
            for i in range(self.vocab_size)
            if (given.is_control(i) or given.is_unused(i)) and i not in taken
        )
        # Pieces such as `<0xE2>`, which spell characters that have no piece of their own.
        byte_ids = {given.id_to_piece(i): i for i in range(self.vocab_size) if given.is_byte(i)}
        prefix = given.normalize("a").removesuffix("a")
        self.text_prefix = b" " if prefix == SPACE_MARK else b""
        self.strips_spaces = given.normalize("a  b") == given.normalize("a b")
        self.lossless = len(byte_ids) == NUM_BYTES and prefix in ("", SPACE_MARK) and _keeps_text(exact)
        # For a lossless model `encode` itself puts `text_prefix` before a text, unless the text continues another one.
        self._processor = exact if self.lossless else given
        self._exact = exact
        # The ids of the three bytes of U+2581, which must not be taken for a space.
        self._mark = [byte_ids[f"<0x{b:02X}>"] for b in SPACE_MARK.encode()] if self.lossless else []
        self._bytes = [_piece_bytes(given, i) for i in range(self.vocab_size)]

    @property
    def model(self) -> bytes:
        """The bytes of the .model file."""
        return self._model

    def piece(self, i: int) -> str:
        """The piece of the id `i`, as the model writes it: `<s>`, `▁the`."""
        return self._exact.id_to_piece(i)

    def scored_pieces(self) -> tuple[list[str], list[float]]:
        """All pieces by their ids, and their scores."""
        ids = range(self.vocab_size)
        return [self.piece(i) for i in ids], [self._exact.get_score(i) for i in ids]

    def piece_types(self) -> list[int]:
        """The kind of each piece, a number in `model_file.py`."""
        kinds = piece_kinds(self._model)
        # Some that are like any other piece in the file stand for no text here.
        return [
            CONTROL if kind == NORMAL and not text else kind
            for kind, text in zip(kinds, self._bytes, strict=True)
        ]

    @property
    def is_bpe(self) -> bool:
        """Whether the model merges pieces in an order, and spells unknown characters in bytes."""
        return self.lossless and not is_unigram(self._model)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        if not text:
            return []
        if not self.lossless:
            # Text that goes on with a space is encoded as it would be after another text (`_continuing`). Before other
            # text the model must put no space of its own.
            spaced = continues and text[0] in _SPACES and self._continuing is not None
            return self._encode(text, (self._continuing if spaced else self._exact) if continues else None)
        # Every U+2581 of the text is replaced by its three bytes, and the parts between are encoded by the model.
        first, *rest = (("" if continues else self.text_prefix.decode()) + text).split(SPACE_MARK)
        ids = self._encode(first)
        for part in rest:
            ids += self._mark
            ids += self._encode(part)
        return ids

    def _encode(self, text: str, processor: sentencepiece.SentencePieceProcessor | None = None) -> list[int]:
        """The ids that the model gives for a text. Raises `UserError` for a lone surrogate."""
        try:
            return (processor or self._processor).encode(text, out_type=int)
        except RuntimeError:
            check_unicode(text)
            raise

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        may_cut = self._may_cut if self.lossless else self._may_cut_at_space
        size = cuts.UNIGRAM_PIECE_CHARS if is_unigram(self._model) else cuts.PIECE_CHARS
        return cuts.cut_text(chunks, may_cut, size)

    def _may_cut(self, text: str, i: int) -> bool:
        """Whether a lossless model can be given the parts before and after character `i` one by one.

        It can if no piece has the characters on both sides of the cut, one after the other. It also can beside U+2581,
        where `encode` splits the text anyway.
        """
        pair = text[i - 1 : i + 1]
        return SPACE_MARK in pair or pair.replace(" ", SPACE_MARK) not in self._neighbours

    def _may_cut_at_space(self, text: str, i: int) -> bool:
        """Whether a model that changes texts can be given the parts before and after character `i` one by one.

        Such a model may turn several spaces into one, or put combining marks in another order. So a cut must lie before
        a single space, and the text around it must give the same ids in one part as in two.
        """
        if (
            self._continuing is None
            or text[i] not in _SPACES
            or text[i - 1].isspace()
            or text[i + 1].isspace()
        ):
            return False
        if text[i - 1] + SPACE_MARK in self._neighbours:
            return False
        left, right = text[max(i - LOOK_AHEAD, 0) : i], text[i : i + LOOK_AHEAD]
        return self._encode(left + right) == self._encode(left) + self._encode(right, self._continuing)

    @functools.cached_property
    def _neighbours(self) -> frozenset[str]:
        """The pairs of neighbouring characters in all pieces that a text can give."""
        model, ids = self._processor, range(self.vocab_size)
        return neighbours(
            model.id_to_piece(i)
            for i in ids
            if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        )

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor | None:
        """The processor that encodes a text that begins with a space as it would be encoded after another text.

        Models differ in this, so both are tried. None if neither of them does it.
        """
        for processor in (self._processor, self._exact):
            if self._encode("ab") + self._encode(" cd", processor) == self._encode("ab cd"):
                return processor
        return None

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        ids = checked_ids(ids, self.vocab_size)
        if not self.lossless:
            # The spaces at the beginning may be spread over several ids.
            stream = StreamDecoder(self, continues)
            return "".join([stream.push(i) for i in ids]) + stream.flush()
        data = b"".join([self._bytes[i] for i in ids])
        return data.removeprefix(b"" if continues else self.text_prefix).decode("utf-8", "replace")

    def id_to_bytes(self, i: int) -> bytes:
        return self._bytes[checked_ids([i], self.vocab_size)[0]]

    def save(self, directory: str | os.PathLike) -> None:
        meta = {"kind": "sentencepiece", "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        write_atomically(Path(directory) / MODEL_FILE, self._model)
        write_atomically(Path(directory) / META_FILE, json.dumps(meta, indent=2))
        save_template(directory, self.chat_template)

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model,), {"chat_template": self.chat_template}


def _keeps_text(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the model keeps a text as it is, except for writing spaces as U+2581."""
    # The probe has what usual normalizations change: spaces at the ends and in a row, a ligature, a full-width letter,
    # a number in a circle, one letter in two spellings, unusual spaces, invisible characters, and a null.
    probe = "  a  b\t\r\n \ufb01\uff21\u2460 e\u0301\u00e9 \u3000\u00a0\u200b\ufeff\u4f60\u0000 "
    return processor.normalize(probe) == probe.replace(" ", SPACE_MARK)


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    """The bytes that the id `i` stands for, none for a control symbol."""
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes((int(piece[1:-1], 16),))
    if processor.is_unknown(i):
        return processor.decode([i]).encode()
    if processor.is_control(i) or processor.is_unused(i):
        return b""
    return piece.replace(SPACE_MARK, " ").encode()


def _first_id(*ids: int | None) -> int:
    """The first of the ids that exists. SentencePiece has -1 for ids that do not."""
    return next(i for i in ids if i is not None and i >= 0)
