"""Text to token ids and back, without losing a character: SentencePiece (BPE, unigram) and plain bytes.

SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) is trained here so that it is lossless: identity
normalization, no dummy prefix, every whitespace kept, byte pieces for whatever the vocabulary lacks. Two
things it cannot do are done around it: a literal U+2581, its own mark for a space, is spelled in byte pieces,
and decoding goes through a table id -> bytes, so that `decode(encode(text)) == text` bit for bit and a stream
can be decoded token by token.

Pieces may cross from letters to punctuation and line ends (`split_by_unicode_script` off, newline an ordinary
character): on unseen halves of the standard library and of a Chinese novel, 7 to 9 percent fewer tokens.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import sentencepiece

from llmjax.data.checksums import DamagedError, raise_unless_damage
from llmjax.data.tokenizer.cuts import LOOK_AHEAD, PIECE_CHARS, UNIGRAM_PIECE_CHARS, cut_text, neighbours
from llmjax.data.tokenizer.model_file import NO_DUMMY_PREFIX, as_control, is_unigram
from llmjax.data.tokenizer.passages import SPACE_MARK, check_unicode, sample_passages, trainable
from llmjax.errors import UserError, choose
from llmjax.files import write_atomically
from llmjax.names import at_home
from llmjax.ranges import Range, check_ranges

TRAINER_VERSION = f"1 {sentencepiece.__version__}"  # raise the 1 when the same text would give another model
_SPACES = " \n"  # before which a model that changes the text may be cut
_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
_MODEL_FILE, _META_FILE = "tokenizer.model", "tokenizer.json"
_UNIGRAM_BYTES = (
    4_000_000  # its time grows faster than the text: 12 MB take 5 times as long, for no better model
)
# What to do about a saved tokenizer that nothing can make again.
_RESTORE = "restore it from a copy, or name another in tokenizer.path"
_MIN_LOG_LEVEL = 3  # fatal only


@dataclasses.dataclass(frozen=True)
class Kind:
    """One value of `tokenizer.kind`: a kind of model that SentencePiece trains under the same name, or a fixed one.

    words       its name in words
    most_bytes  of text to train on
    fixed       (num_reserved) -> the tokenizer, where nothing is trained
    """

    words: str
    most_bytes: float = math.inf
    fixed: Callable[[int], Tokenizer] | None = None

    @property
    def trained(self) -> bool:
        return self.fixed is None


KINDS = {
    "bpe": Kind("SentencePiece BPE"),
    "unigram": Kind("SentencePiece unigram", most_bytes=_UNIGRAM_BYTES),
    "byte": Kind("bytes", fixed=lambda num_reserved: ByteTokenizer(num_reserved)),
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens.

    kind                bpe, unigram (slower to train) or byte (256 bytes and the special ids; for tests)
    path                an existing SentencePiece .model, or a directory written by `save`: nothing is trained
    vocab_size          ids in all, special and byte pieces included; bytes have a fixed number of ids
    train_bytes         how much text is sampled for training; unigram takes at most 4 MB of it
    character_coverage  share of the text whose characters get an id of their own, the rest being spelled in
                        bytes; never more characters than half of the free ids, so that Chinese fits
    num_reserved        ids `<reserved_0>`... that no text produces, for later use (chat turns, tasks)
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
        smallest = _smallest_vocabulary(self)
        if KINDS[self.kind].trained and not self.path and self.vocab_size < smallest:
            raise UserError(
                f"tokenizer.vocab_size = {self.vocab_size} leaves no room beside the special and "
                f"byte pieces: use at least {smallest}."
            )


class Tokenizer(Protocol):
    """What the rest of llmjax needs of a tokenizer. Immutable and picklable.

    lossless     whether `decode(encode(text)) == text` for every text
    fingerprint  a SHA-256 in hex; equal fingerprints mean equal ids
    text_prefix  what the model puts before every text (`b" "` or nothing); `decode` takes it off again
    strips_spaces  whether the model takes spaces at the beginning of a text for none

    A model without a pad or mask piece has `pad_id` and `mask_id` alias the unknown piece; without bos,
    `bos_id` aliases `pad_id` (T5 starts its decoder so).
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
    unk_id: int
    fingerprint: str

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of the text alone: no bos or eos. Text that looks like a special piece is just text.

        `continues`: the text is a later one of `pieces`.
        """

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """A long text, given in chunks, cut anew so that the ids of the pieces, joined, are those of the whole."""

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """Text of the ids; special ids vanish, bytes that are not UTF-8 become U+FFFD.

        `continues`: the ids go on after others, so that a space at their beginning is one.
        """

    def id_to_bytes(self, i: int) -> bytes:
        """What one id stands for, perhaps part of a character; empty for special ids."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes what `load_tokenizer` reads; the directory is made if need be."""


class SentencePieceTokenizer:
    """A SentencePiece model, trained here or elsewhere, given as the bytes of its .model file."""

    def __init__(self, model: bytes):
        self._model = model
        sentencepiece.set_min_log_level(_MIN_LOG_LEVEL)
        given = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = given.vocab_size()
        pieces = {given.id_to_piece(i): i for i in range(self.vocab_size)}
        self.unk_id = given.unk_id()
        # The processor reads an empty file without a word.
        if self.unk_id < 0:
            raise ValueError("a SentencePiece model has an unknown piece")
        self.pad_id = _first_id(given.pad_id(), pieces.get("<pad>"), self.unk_id)
        self.bos_id = _first_id(given.bos_id(), self.pad_id)
        self.eos_id = _first_id(given.eos_id(), self.bos_id)
        self.mask_id = _first_id(pieces.get("<mask>"), pieces.get("[MASK]"), self.unk_id)
        taken = {self.pad_id, self.bos_id, self.eos_id, self.mask_id, self.unk_id}
        # Some models have a pad or mask piece that a text which spells it would give.
        spelled = [i for i in taken - {self.unk_id} if not (given.is_control(i) or given.is_unused(i))]
        if spelled:
            model = as_control(model, spelled)
            given = sentencepiece.SentencePieceProcessor(model_proto=model)
        exact = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        self.reserved_ids = tuple(
            i
            for i in range(self.vocab_size)
            if (given.is_control(i) or given.is_unused(i)) and i not in taken
        )
        byte_ids = {given.id_to_piece(i): i for i in range(self.vocab_size) if given.is_byte(i)}
        prefix = given.normalize("a").removesuffix("a")
        self.text_prefix = b" " if prefix == SPACE_MARK else b""
        self.strips_spaces = given.normalize("a  b") == given.normalize("a b")
        self.lossless = len(byte_ids) == 256 and prefix in ("", SPACE_MARK) and _keeps_text(exact)
        self._processor = exact if self.lossless else given
        self._exact = exact
        self._mark = [byte_ids[f"<0x{b:02X}>"] for b in SPACE_MARK.encode()] if self.lossless else []
        self._bytes = [_piece_bytes(given, i) for i in range(self.vocab_size)]

    def encode(self, text: str, continues: bool = False) -> list[int]:
        if not text:
            return []
        if not self.lossless:
            spaced = continues and text[0] in _SPACES and self._continuing is not None
            return self._encode(text, (self._continuing if spaced else self._exact) if continues else None)
        first, *rest = (("" if continues else self.text_prefix.decode()) + text).split(SPACE_MARK)
        ids = self._encode(first)
        for part in rest:
            ids += self._mark
            ids += self._encode(part)
        return ids

    def _encode(self, text: str, processor: sentencepiece.SentencePieceProcessor | None = None) -> list[int]:
        try:
            return (processor or self._processor).encode(text, out_type=int)
        except RuntimeError:
            check_unicode(text)
            raise

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        may_cut = self._may_cut if self.lossless else self._may_cut_at_space
        return cut_text(chunks, may_cut, UNIGRAM_PIECE_CHARS if is_unigram(self._model) else PIECE_CHARS)

    def _may_cut(self, text: str, i: int) -> bool:
        """A cut that no piece reaches across; SentencePiece itself never sees a literal U+2581."""
        pair = text[i - 1 : i + 1]
        return SPACE_MARK in pair or pair.replace(" ", SPACE_MARK) not in self._neighbours

    def _may_cut_at_space(self, text: str, i: int) -> bool:
        """A cut before a single space, for models that change the text and may collapse spaces or reorder marks.

        The model encodes both sides of the cut together and apart: the tokens must be the same.
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
        """Pairs of characters that a piece holds which a text can give."""
        model, ids = self._processor, range(self.vocab_size)
        return neighbours(
            model.id_to_piece(i)
            for i in ids
            if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        )

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor | None:
        """What encodes a text from a space on as if another came before it; None where neither does."""
        for processor in (self._processor, self._exact):
            if self._encode("ab") + self._encode(" cd", processor) == self._encode("ab cd"):
                return processor
        return None

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        ids = _id_list(ids, self.vocab_size)
        if not self.lossless:
            stream = StreamDecoder(self, continues)
            return "".join([stream.push(i) for i in ids]) + stream.flush()
        data = b"".join([self._bytes[i] for i in ids])
        return data.removeprefix(b"" if continues else self.text_prefix).decode("utf-8", "replace")

    def id_to_bytes(self, i: int) -> bytes:
        return self._bytes[_id_list([i], self.vocab_size)[0]]

    def save(self, directory: str | os.PathLike) -> None:
        meta = {"kind": "sentencepiece", "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        write_atomically(Path(directory) / _MODEL_FILE, self._model)
        write_atomically(Path(directory) / _META_FILE, json.dumps(meta, indent=2))

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model,)


class ByteTokenizer:
    """Special ids, then the 256 bytes of UTF-8. Nothing is trained."""

    text_prefix = b""
    strips_spaces = False
    lossless = True

    def __init__(self, num_reserved: int = 16):
        self._num_reserved = num_reserved
        self.pad_id, self.bos_id, self.eos_id, self.unk_id, self.mask_id = range(len(_SPECIALS))
        self._first_byte = len(_SPECIALS) + num_reserved
        self.reserved_ids = tuple(range(len(_SPECIALS), self._first_byte))
        self.vocab_size = self._first_byte + 256
        self.fingerprint = hashlib.sha256(f"byte {num_reserved}".encode()).hexdigest()

    def encode(self, text: str, continues: bool = False) -> list[int]:
        check_unicode(text)
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        return (data.astype(np.int64) + self._first_byte).tolist()

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        return cut_text(chunks, lambda text, i: True, PIECE_CHARS)

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        data = b"".join([self.id_to_bytes(i) for i in _id_list(ids, self.vocab_size)])
        return data.decode("utf-8", "replace")

    def id_to_bytes(self, i: int) -> bytes:
        i = _id_list([i], self.vocab_size)[0] - self._first_byte
        return bytes((i,)) if i >= 0 else b""

    def save(self, directory: str | os.PathLike) -> None:
        meta = {"kind": "byte", "num_reserved": self._num_reserved, "fingerprint": self.fingerprint}
        write_atomically(Path(directory) / _META_FILE, json.dumps(meta, indent=2))

    def __reduce__(self):
        return ByteTokenizer, (self._num_reserved,)


class StreamDecoder:
    """Decodes token by token; what it returns, joined, is `decode` of all ids. Holds back incomplete UTF-8.

    `continues`: the ids go on after a prompt, so that a space at their beginning is one.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = not continues

    def push(self, i: int) -> str:
        """The characters that this id completes, often none or several."""
        data = self._tokenizer.id_to_bytes(i)
        if data and self._begins:
            if self._tokenizer.strips_spaces and i != self._tokenizer.unk_id:
                data = data.lstrip(b" ")
            else:
                data = data.removeprefix(self._tokenizer.text_prefix)
            self._begins = not data and self._tokenizer.strips_spaces
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What was held back, as U+FFFD; call it once at the end."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str | Iterable[str]]) -> Tokenizer:
    """Trains on a sample of the texts; the same texts in any order give the same model, on any machine.

    Texts stream through, long ones as iterables of their chunks, and about `config.train_bytes` are kept. A
    `UserError` says so where the texts are too few for the vocabulary, and names the largest that works.
    `config.path` is not looked at: see `load_tokenizer`.
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
    while model is None and fitting >= _smallest_vocabulary(config):  # fewer ids also mean fewer characters
        largest = fitting
        model, fitting = _train_model(dataclasses.replace(config, vocab_size=largest), sample)
    advice = "no smaller one would do: add text, or set tokenizer.kind to byte"
    if model is not None:
        advice = f"{largest} would do: use at most {largest}, or more text"
    raise UserError(
        f"tokenizer.vocab_size = {config.vocab_size} is more than this corpus can fill, and {advice}."
    )


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a directory written by `save`, or a SentencePiece .model file made by anyone.

    Raises `DamagedError` where it is neither, or not what was saved.
    """
    path = at_home(path, "tokenizer.path")
    saved = {}
    if os.path.lexists(path / _META_FILE) and not _is_foreign(path):
        saved = _read_meta(path / _META_FILE)
    if saved.get("kind") == "byte":
        tokenizer: Tokenizer = ByteTokenizer(saved["num_reserved"])
    else:
        tokenizer = _read_model(path / _MODEL_FILE if path.is_dir() else path, saved.get("fingerprint"))
    if saved and saved.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise DamagedError(f"tokenizer {str(path)!r} is damaged (it is not what was saved there)", _RESTORE)
    return tokenizer


def _is_foreign(folder: Path) -> bool:
    """Whether the tokenizer.json of a folder is the one of Hugging Face, which is another thing than ours; it is passed
    over where tokenizer.model lies beside it, and otherwise refused."""
    try:
        saved = json.loads((folder / _META_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise_unless_damage(error)
        return False
    if not isinstance(saved, dict) or "kind" in saved or not isinstance(saved.get("model"), dict):
        return False
    if (folder / _MODEL_FILE).is_file():
        return True
    raise DamagedError(
        f"tokenizer.path = {str(folder)!r} holds a tokenizer.json of Hugging Face and no tokenizer.model",
        "llmjax reads SentencePiece models only; name one, or leave tokenizer.path empty to train a tokenizer",
    )


def _read_meta(path: Path) -> dict:
    """What `save` wrote beside the model."""
    try:
        saved = json.loads(path.read_bytes())
        if saved["kind"] == "sentencepiece" or (
            saved["kind"] == "byte" and 0 <= saved["num_reserved"] < 1 << 31
        ):
            return saved
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_unless_damage(error)
    raise DamagedError(f"tokenizer {str(path.parent)!r} is damaged (no readable {path.name})", _RESTORE)


def _read_model(path: Path, fingerprint: str | None) -> SentencePieceTokenizer:
    """The model in a file; one that is not what was saved is not even parsed."""
    if not path.is_file():
        raise DamagedError(
            f"tokenizer.path = {str(path)!r} is no tokenizer",
            "name a SentencePiece .model file or a directory that holds tokenizer.model",
        )
    model = path.read_bytes()
    if fingerprint not in (None, hashlib.sha256(model).hexdigest()):
        raise DamagedError(f"tokenizer {str(path)!r} is damaged (it is not what was saved there)", _RESTORE)
    try:
        return SentencePieceTokenizer(model)
    except (RuntimeError, ValueError):
        raise DamagedError(
            f"tokenizer.path = {str(path)!r} cannot be read as a SentencePiece model", "name another file"
        ) from None


def _train_model(config: TokenizerConfig, sample: Sequence[str]) -> tuple[bytes | None, int]:
    """(model file, its size in ids), or None and how many ids at most where the sample is too small."""
    reserved = [f"<reserved_{i}>" for i in range(config.num_reserved)]
    free = config.vocab_size - len(_SPECIALS) - config.num_reserved - 256
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(trainable(sample, config.character_coverage, free // 2)),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
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
            pad_piece=_SPECIALS[0],
            bos_piece=_SPECIALS[1],
            eos_piece=_SPECIALS[2],
            unk_piece=_SPECIALS[3],
            control_symbols=[_SPECIALS[4], *reserved],
            max_sentence_length=1 << 24,
            minloglevel=_MIN_LOG_LEVEL,
            num_threads=4,
        )  # fixed: the sums of unigram training depend on it
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        return None, int(largest[1]) if largest else 0
    return model.getvalue(), config.vocab_size


def _smallest_vocabulary(config: TokenizerConfig) -> int:
    return len(_SPECIALS) + config.num_reserved + 256 + 8


def _keeps_text(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether normalization only respells spaces; the probe has what NFKC, trimming and folding change."""
    probe = "  a  b\t\r\n \ufb01\uff21\u2460 e\u0301\u00e9 \u3000\u00a0\u200b\ufeff\u4f60\u0000 "
    return processor.normalize(probe) == probe.replace(" ", SPACE_MARK)


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes((int(piece[1:-1], 16),))
    if processor.is_unknown(i):
        return processor.decode([i]).encode()
    if processor.is_control(i) or processor.is_unused(i):
        return b""
    return piece.replace(SPACE_MARK, " ").encode()


def _first_id(*ids: int | None) -> int:
    return next(i for i in ids if i is not None and i >= 0)


def _id_list(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise IndexError(f"token ids must lie in [0, {vocab_size}): got {ids.min()} to {ids.max()}")
    return ids.tolist()
