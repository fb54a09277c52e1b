"""Reads a tokenizer: a folder that llmjax wrote, or a file of any origin."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from llmjax.data.checksums import DamagedError, raise_unless_damage
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.formats.gguf_vocabulary import gguf_template, read_gguf_tokenizer
from llmjax.data.tokenizer.formats.json_folder import (
    MERGES,
    VOCABULARY,
    WORD_PIECES,
    read_gpt2_files,
    read_tokenizer_json,
    read_word_pieces,
    template_in,
)
from llmjax.data.tokenizer.json_tokenizer import JSON_FILE, JsonTokenizer, SpecialIds
from llmjax.data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llmjax.data.tokenizer.tokenizer import META_FILE, MODEL_FILE, Tokenizer
from llmjax.errors import UserError
from llmjax.gguf.header import is_gguf
from llmjax.names import at_home

# What to do about a damaged tokenizer, which cannot be made again because the model was trained with it.
_RESTORE = "restore it from a copy, or name another in tokenizer.path"
# The reserved ids of a byte tokenizer are fewer than this; a larger number is damage.
_MAX_RESERVED = 1 << 31


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer.

    path  a folder that `save` wrote, a SentencePiece .model file, a tokenizer.json of Hugging Face, a vocab.txt of
          BERT, a folder with one of these or with vocab.json and merges.txt of GPT-2, or a GGUF file

    Raises `DamagedError` if `path` is none of them, or if the files are not as they were saved.
    """
    path = at_home(path, "tokenizer.path")
    tokenizer = _load(path)
    tokenizer.chat_template = gguf_template(path) if is_gguf(path) else template_in(path)
    return tokenizer


def _load(path: Path) -> Tokenizer:
    if is_gguf(path):
        return read_gguf_tokenizer(path)
    # lexists, because a broken link in place of the file is damage, which `_read_meta` reports.
    if not os.path.lexists(path / META_FILE) or _is_foreign(path / META_FILE):
        return _read_foreign(path)
    saved = _read_meta(path / META_FILE)
    tokenizer = _SAVED[saved["kind"]](path, saved)
    # A model was compared before it was parsed, and the others are compared here.
    if saved.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise DamagedError(f"tokenizer {str(path)!r} is damaged (it is not what was saved there)", _RESTORE)
    return tokenizer


def _read_foreign(path: Path) -> Tokenizer:
    """Reads a file that others wrote, or the one that a folder holds. A SentencePiece model comes first."""
    if path.is_dir() and not (path / MODEL_FILE).is_file():
        if (path / META_FILE).is_file():
            return _read_json(path / META_FILE, read_tokenizer_json)
        if (path / VOCABULARY).is_file() and (path / MERGES).is_file():
            return _read_json(path, read_gpt2_files)
        if (path / WORD_PIECES).is_file():
            return _read_json(path / WORD_PIECES, read_word_pieces)
    if path.suffix == ".json":
        return _read_json(path, read_tokenizer_json)
    if path.suffix == ".txt":
        return _read_json(path, read_word_pieces)
    return _read_model(path / MODEL_FILE if path.is_dir() else path, None)


def _read_json(path: Path, read: Callable[[Path], Tokenizer]) -> Tokenizer:
    """What `read` makes of `path`. Raises `DamagedError` for what is wrong with it."""
    try:
        return read(path)
    except (OSError, ValueError) as why:
        if isinstance(why, UserError):
            raise
        raise_unless_damage(why)
        raise DamagedError(
            f"tokenizer {str(path)!r} cannot be read ({why})", "name another tokenizer"
        ) from None


def _is_foreign(file: Path) -> bool:
    """Whether a tokenizer.json is one of Hugging Face, and not ours, which has the same name but another content."""
    try:
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise_unless_damage(error)
        return False
    return isinstance(saved, dict) and "kind" not in saved and isinstance(saved.get("model"), dict)


def _read_meta(path: Path) -> dict:
    """The JSON object that `save` wrote: the kind, the fingerprint and the like. Raises `DamagedError`."""
    try:
        saved = json.loads(path.read_bytes())
        if saved["kind"] in _SAVED and 0 <= saved.get("num_reserved", 0) < _MAX_RESERVED:
            return saved
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_unless_damage(error)
    raise DamagedError(f"tokenizer {str(path.parent)!r} is damaged (no readable {path.name})", _RESTORE)


def _read_saved_bytes(path: Path, saved: dict) -> Tokenizer:
    try:
        return ByteTokenizer(saved["num_reserved"])
    except (KeyError, TypeError):
        raise DamagedError(f"tokenizer {str(path)!r} is damaged (it lacks num_reserved)", _RESTORE) from None


def _read_saved_model(path: Path, saved: dict) -> Tokenizer:
    return _read_model(path / MODEL_FILE, saved.get("fingerprint"))


def _read_saved_json(path: Path, saved: dict) -> Tokenizer:
    try:
        text = (path / JSON_FILE).read_text(encoding="utf-8")
        return JsonTokenizer(text, SpecialIds(**saved["special"]), saved["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise_unless_damage(error)
        raise DamagedError(
            f"tokenizer {str(path)!r} is damaged (no readable {JSON_FILE})", _RESTORE
        ) from None


def _read_model(path: Path, fingerprint: str | None) -> SentencePieceTokenizer:
    """Reads a SentencePiece model. Raises `DamagedError` if it is none, or has another fingerprint than the saved one.

    The fingerprint is compared first, because the parser of SentencePiece may crash on a damaged file.
    """
    if not path.is_file():
        raise DamagedError(
            f"tokenizer {str(path)!r} is no tokenizer",
            "name a SentencePiece .model file, a tokenizer.json, a GGUF file, or a folder that holds one of them",
        )
    model = path.read_bytes()
    if fingerprint not in (None, hashlib.sha256(model).hexdigest()):
        raise DamagedError(f"tokenizer {str(path)!r} is damaged (it is not what was saved there)", _RESTORE)
    try:
        return SentencePieceTokenizer(model)
    except (RuntimeError, ValueError):
        raise DamagedError(
            f"tokenizer {str(path)!r} cannot be read as a SentencePiece model", "name another file"
        ) from None


# How a folder that `save` wrote is read, by the kind of its tokenizer.
_SAVED: dict[str, Callable[[Path, dict], Tokenizer]] = {
    "byte": _read_saved_bytes,
    "sentencepiece": _read_saved_model,
    "json": _read_saved_json,
}
