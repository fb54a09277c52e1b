"""Tokenizers of Hugging Face (tokenizer.json) as tokenizers of ours, by the package `tokenizers`.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), the BPE of SentencePiece (Llama 2, Gemma) and WordPiece (BERT) are read.
Two things differ from what the package does by itself. First, a text that spells a special token is text; a unigram
model of the package cannot do that, and is refused. Second, a table gives the bytes of each id, so that ids can be
decoded one at a time: a Chinese character may be spread over several.

A text comes back as it was from byte-level BPE alone (`lossless`). The others may change its characters (a normalizer),
and WordPiece loses capitals, accents and spaces.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmjax.data.tokenizer import cuts
from llmjax.data.tokenizer.cuts import LOOK_AHEAD, neighbours
from llmjax.data.tokenizer.formats import word_piece
from llmjax.data.tokenizer.formats.byte_bpe import byte_characters
from llmjax.data.tokenizer.passages import SPACE_MARK, check_unicode
from llmjax.data.tokenizer.tokenizer import META_FILE, NUM_BYTES, checked_ids, save_template
from llmjax.errors import UserError
from llmjax.files import write_atomically

# The file of Hugging Face in a folder that `save` wrote, where tokenizer.json is the name of a file of ours.
JSON_FILE = "huggingface.json"
READ = "byte-level BPE, BPE as SentencePiece has it, and WordPiece are read"
# How pieces stand for text: as bytes, each written as a character; with U+2581 for a space; or as words, where a piece
# that goes on with a word begins with a mark, such as ##.
BYTES, SPACES, WORDS = "bytes", "spaces", "words"


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The ids of the special tokens, None for those that a tokenizer does not have."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    mask: int | None = None


class JsonTokenizer:
    """A tokenizer.json as a `Tokenizer`.

    Args:
      definition: the contents of tokenizer.json.
      special: the ids of special tokens, which are said in other files.
      vocab_size: the number of ids, if it is to be more than the tokenizer has. No text gives the others.

    Raises ValueError, as the end of a sentence, if it is no tokenizer that is read here.
    """

    chat_template = ""

    def __init__(self, definition: str, special: SpecialIds, vocab_size: int = 0):
        self.definition, self.special = definition, special
        contents = _parse(definition)
        self._style = _style_of(contents)
        self.prefixes_parts = _prefixes_parts(contents)
        prefix, plain = _without_prefix(contents)
        self._library = _library_tokenizer(plain)
        # Special tokens in a text are encoded as any other text.
        self._library.encode_special_tokens = True
        added = self._library.get_added_tokens_decoder()
        controls = {i: token.content for i, token in added.items() if token.special}
        self._check_controls(controls)
        pieces = {i: piece for piece, i in self._library.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(vocab_size, max(pieces, default=-1) + 1)
        self._set_ids(controls, pieces)
        self._bytes = [b""] * self.vocab_size
        bytes_of = _bytes_in(self._style, contents["model"])
        for i, piece in pieces.items():
            if i in added:
                self._bytes[i] = b"" if i in controls else piece.encode()
            else:
                self._bytes[i] = bytes_of(piece)
        taken = {self.pad_id, self.bos_id, self.eos_id, self.mask_id, self.unk_id}
        self.reserved_ids = tuple(i for i in range(self.vocab_size) if not self._bytes[i] and i not in taken)
        self.text_prefix = b" " if prefix or self.is_word_piece else b""
        self.strips_spaces = self.is_word_piece
        whole = sum(len(data) == 1 for data in set(self._bytes)) == NUM_BYTES
        strips = any(token.lstrip or token.rstrip for token in added.values())
        self.lossless = (
            self._style == BYTES
            and whole
            and not strips
            and prefix in ("", "always")
            and not plain["normalizer"]
        )
        # How the text itself is prefixed, by `encode` and not by the package.
        self._prefix = prefix
        said = json.dumps([dataclasses.asdict(special), self.vocab_size])
        self.fingerprint = hashlib.sha256(f"{said}\n{definition}".encode()).hexdigest()

    @property
    def is_word_piece(self) -> bool:
        """Whether it is WordPiece, whose texts begin with [CLS] and end with [SEP]."""
        return self._style == WORDS

    def _check_controls(self, controls: Mapping[int, str]) -> None:
        """ValueError where a text that spells a special token would give its id, in spite of what was asked for."""
        # A text that spells one may be unknown, as any other.
        others = controls.keys() - {self.special.unk}
        for content in controls.values():
            if not others.isdisjoint(self._library.encode(content, add_special_tokens=False).ids):
                raise ValueError(f"a text that spells {content!r} would give this special token")

    def _set_ids(self, controls: Mapping[int, str], pieces: Mapping[int, str]) -> None:
        given = self.special
        if any(i not in pieces for i in dataclasses.astuple(given) if i is not None):
            raise ValueError("an id of a special token is in no vocabulary")
        some = _first(given.eos, given.bos, given.pad, given.unk, *sorted(controls))
        if some is None:
            raise ValueError("it has no special token, with which a text could begin or end")
        named = {content: i for i, content in controls.items()}
        self.unk_id: int = _first(given.unk, given.pad, some)
        self.pad_id: int = _first(given.pad, self.unk_id)
        self.bos_id: int = _first(given.bos, given.pad, some)
        self.eos_id: int = _first(given.eos, self.bos_id)
        self.mask_id: int = _first(given.mask, named.get("<mask>"), named.get("[MASK]"), self.unk_id)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        if not continues and text and self._prefix and (self._prefix == "always" or text[0] != " "):
            text = " " + text
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        """The ids that the package gives for a text. Raises `UserError` for a lone surrogate."""
        try:
            return self._library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError):
            check_unicode(text)
            raise

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        return cuts.cut_text(chunks, self._may_cut, cuts.PIECE_CHARS)

    def _may_cut(self, text: str, i: int) -> bool:
        """Whether the parts before and after character `i` may be encoded one by one.

        Texts are split before a single space after other text, and after a line end, in all vocabularies that are
        known. A vocabulary that splits nothing must have no piece with the characters on both sides. As the
        expressions that split a text may be any, the text around the cut is encoded in one part and in two.
        """
        before, after = text[i - 1], text[i]
        at_space = after == " " and not before.isspace() and not text[i + 1].isspace()
        at_line = before == "\n" and not after.isspace()
        if not (at_space or at_line):
            return False
        if self._style == SPACES and (before + after).replace(" ", SPACE_MARK) in self._neighbours:
            return False
        left, right = text[max(i - LOOK_AHEAD, 0) : i], text[i : i + LOOK_AHEAD]
        return self._encode(left + right) == self._encode(left) + self._encode(right)

    @functools.cached_property
    def _neighbours(self) -> frozenset[str]:
        """The pairs of neighbouring characters in all pieces."""
        return neighbours(self._library.get_vocab(with_added_tokens=False))

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        data = b"".join([self._bytes[i] for i in checked_ids(ids, self.vocab_size)])
        return data.removeprefix(b"" if continues else self.text_prefix).decode("utf-8", "replace")

    def id_to_bytes(self, i: int) -> bytes:
        return self._bytes[checked_ids([i], self.vocab_size)[0]]

    def piece(self, i: int) -> str:
        """The piece of the id `i`, as the vocabulary writes it; nothing if it has none."""
        return self._library.id_to_token(i) or ""

    def save(self, directory: str | os.PathLike) -> None:
        meta = {
            "kind": "json",
            "vocab_size": self.vocab_size,
            "special": dataclasses.asdict(self.special),
            "fingerprint": self.fingerprint,
        }
        write_atomically(Path(directory) / JSON_FILE, self.definition)
        write_atomically(Path(directory) / META_FILE, json.dumps(meta, indent=2))
        save_template(directory, self.chat_template)

    def __reduce__(self):
        return (
            JsonTokenizer,
            (self.definition, self.special, self.vocab_size),
            {"chat_template": self.chat_template},
        )


def _first(*ids: int | None) -> Any:
    """The first of the ids that exists."""
    return next((i for i in ids if i is not None), None)


def _parse(definition: str) -> dict[str, Any]:
    try:
        contents = json.loads(definition)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(contents, dict) or not isinstance(contents.get("model"), dict):
        raise ValueError("it is no tokenizer.json of Hugging Face")
    # What is said of whole batches, and what is put around a text, has no meaning here.
    contents |= {"truncation": None, "padding": None, "post_processor": None}
    return {"normalizer": None, "pre_tokenizer": None, "decoder": None, **contents}


def _library_tokenizer(contents: Mapping[str, Any]) -> Any:
    """The tokenizer of the package. UserError if the package is missing, ValueError if it cannot read the contents."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "tokenizer.json and the byte-level BPE of GGUF files are read by the package tokenizers; pip install "
            "llmjax[convert]"
        ) from None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(contents))
    except Exception as why:  # the package raises nothing more special
        raise ValueError(f"the package tokenizers cannot read it: {why}") from None


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or the like: itself, or those of a Sequence, which lists them under `inner`."""
    if not isinstance(part, dict):
        return []
    return [part] if part.get("type") != "Sequence" else list(part.get(inner, []))


def _style_of(contents: Mapping[str, Any]) -> str:
    """How the pieces stand for text: `BYTES`, `SPACES` or `WORDS`. ValueError if it is another way."""
    kind = contents["model"].get("type", "BPE")
    before = _steps(contents["pre_tokenizer"], "pretokenizers")
    after = _steps(contents["decoder"], "decoders")
    if kind == "WordPiece":
        return WORDS
    if kind != "BPE":
        raise ValueError(f"it is a {kind} tokenizer, and {READ}; give its SentencePiece model")
    if any(step.get("type") == "ByteLevel" for step in [*before, *after]):
        return BYTES
    marks = [*_steps(contents["normalizer"], "normalizers"), *before]
    if any(SPACE_MARK in (step.get("content"), step.get("replacement")) for step in marks):
        return SPACES
    raise ValueError(f"it is another kind of BPE, and {READ}")


def _bytes_in(style: str, model: Mapping[str, Any]) -> Callable[[str], bytes]:
    """A function that gives the bytes of a piece of this style."""
    if style == WORDS:
        prefix = model.get("continuing_subword_prefix", word_piece.PREFIX)
        return lambda piece: word_piece.piece_bytes(piece, prefix)
    characters = byte_characters() if style == BYTES else None
    return lambda piece: _piece_bytes(piece, characters)


def _without_prefix(contents: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whether a space is put before a text ("", "always", or "unless_space"), and the contents without that."""
    prefix, copied = "", json.loads(json.dumps(contents))
    normalizers = _steps(copied["normalizer"], "normalizers")
    kept = [step for step in normalizers if step.get("type") != "Prepend"]
    if len(kept) < len(normalizers):
        prefix = "always"
        copied["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps(copied["pre_tokenizer"], "pretokenizers"):
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space", True):
            prefix, step["add_prefix_space"] = "unless_space", False
        if step.get("type") == "Metaspace" and (
            step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        ):
            prefix, step["prepend_scheme"] = "unless_space", "never"
            step.pop("add_prefix_space", None)
    return prefix, copied


def _prefixes_parts(contents: Mapping[str, Any]) -> bool:
    """Whether the package also puts a space before each part of a text that follows a special token."""
    if any(step.get("type") == "Prepend" for step in _steps(contents["normalizer"], "normalizers")):
        return True
    asks = [
        step
        for step in _steps(contents["pre_tokenizer"], "pretokenizers")
        if step.get("add_prefix_space", True)
    ]
    return any(
        step.get("type") == "ByteLevel"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") == "always")
        for step in asks
    )


def _piece_bytes(piece: str, characters: Mapping[str, int] | None) -> bytes:
    """The bytes of a piece: its `characters` stand for bytes, or for None, U+2581 for a space and <0x0A> for a byte."""
    if characters is not None:
        known = all(character in characters for character in piece)
        return bytes(characters[character] for character in piece) if known else piece.encode()
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes((int(piece[3:5], 16),))
        except ValueError:
            pass
    return piece.replace(SPACE_MARK, " ").encode()
