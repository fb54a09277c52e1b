"""Reads a saved tokenizer: a folder that llmjax wrote, or a SentencePiece model of any origin."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from llmjax.data.checksums import DamagedError, raise_unless_damage
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llmjax.data.tokenizer.tokenizer import META_FILE, MODEL_FILE, Tokenizer
from llmjax.names import at_home

# What to do about a damaged tokenizer, which cannot be made again because the model was trained with it.
_RESTORE = "restore it from a copy, or name another in tokenizer.path"
# The reserved ids of a byte tokenizer are fewer than this; a larger number is damage.
_MAX_RESERVED = 1 << 31


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a folder that `save` wrote, or a SentencePiece .model file.

    Raises `DamagedError` if `path` is neither of the two, or if the files are not as they were saved.
    """
    path = at_home(path, "tokenizer.path")
    saved = {}
    # lexists, because a broken link in place of the file is damage, which `_read_meta` reports.
    if os.path.lexists(path / META_FILE) and not _is_foreign(path):
        saved = _read_meta(path / META_FILE)
    if saved.get("kind") == "byte":
        tokenizer: Tokenizer = ByteTokenizer(saved["num_reserved"])
    else:
        tokenizer = _read_model(path / MODEL_FILE if path.is_dir() else path, saved.get("fingerprint"))
    # A model was compared before it was parsed, and a byte tokenizer is compared here.
    if saved and saved.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise DamagedError(f"tokenizer {str(path)!r} is damaged (it is not what was saved there)", _RESTORE)
    return tokenizer


def _is_foreign(folder: Path) -> bool:
    """Whether the tokenizer.json of a folder is a file of Hugging Face, which has the same name but another content.

    It is ignored if a tokenizer.model lies beside it. Raises `DamagedError` if none does.
    """
    try:
        saved = json.loads((folder / META_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise_unless_damage(error)
        return False
    if not isinstance(saved, dict) or "kind" in saved or not isinstance(saved.get("model"), dict):
        return False
    if (folder / MODEL_FILE).is_file():
        return True
    raise DamagedError(
        f"tokenizer.path = {str(folder)!r} holds a tokenizer.json of Hugging Face and no tokenizer.model",
        "llmjax reads SentencePiece models only; name one, or leave tokenizer.path empty to train a tokenizer",
    )


def _read_meta(path: Path) -> dict:
    """The JSON object that `save` wrote: the kind, the fingerprint and the like. Raises `DamagedError`."""
    try:
        saved = json.loads(path.read_bytes())
        if saved["kind"] == "sentencepiece" or (
            saved["kind"] == "byte" and 0 <= saved["num_reserved"] < _MAX_RESERVED
        ):
            return saved
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_unless_damage(error)
    raise DamagedError(f"tokenizer {str(path.parent)!r} is damaged (no readable {path.name})", _RESTORE)


def _read_model(path: Path, fingerprint: str | None) -> SentencePieceTokenizer:
    """Reads a SentencePiece model. Raises `DamagedError` if it is none, or has another fingerprint than the saved one.

    The fingerprint is compared first, because the parser of SentencePiece may crash on a damaged file.
    """
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
