"""The tokenizer files of a folder of Hugging Face: tokenizer.json, vocab.json with merges.txt, as GPT-2 has them, or
vocab.txt, as BERT has it.

Which tokens begin and end a text is said in a file beside them, tokenizer_config.json.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.data.tokenizer.formats import word_piece
from llmjax.data.tokenizer.formats.byte_bpe import SPLITTINGS, definition
from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer, SpecialIds
from llmjax.data.tokenizer.tokenizer import TEMPLATE_FILE
from llmjax.ranges import shown

CONFIG, VOCABULARY, MERGES = "tokenizer_config.json", "vocab.json", "merges.txt"
WORD_PIECES = "vocab.txt"
# Larger templates are not read. A choice.
MOST_BYTES = 1 << 20
# The token that begins and ends texts of GPT-2.
GPT2_END = "<|endoftext|>"
# The names of the special tokens there, by ours. Of several the first one that is said counts.
NAMES = {
    "bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token"), "pad": ("pad_token",), "unk": ("unk_token",),
    "mask": ("mask_token",),
}  # fmt: skip


def read_tokenizer_json(path: Path) -> JsonTokenizer:
    """The tokenizer in the file `path`. ValueError, as the end of a sentence, if it is none that is read here."""
    text = path.read_text(encoding="utf-8")
    contents = _object(text, path.name)
    ids = _all_ids(contents)
    found = _special_ids(_config_beside(path), ids)
    if contents["model"].get("type") == "WordPiece":
        found = {name: ids.get(word_piece.SPECIAL[name]) if i is None else i for name, i in found.items()}
    return JsonTokenizer(text, SpecialIds(**found))


def read_word_pieces(path: Path) -> JsonTokenizer:
    """The tokenizer of BERT with the vocabulary in the file `path`. ValueError says what is wrong with it."""
    pieces = word_piece.read_pieces(path.read_text(encoding="utf-8"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    special = {name: ids.get(piece) for name, piece in word_piece.SPECIAL.items()}
    return JsonTokenizer(word_piece.definition(pieces, _config_beside(path)), SpecialIds(**special))


def read_gpt2_files(folder: Path) -> JsonTokenizer:
    """The tokenizer of GPT-2 in vocab.json and merges.txt. ValueError says what is wrong with them."""
    vocabulary = _object((folder / VOCABULARY).read_text(encoding="utf-8"), VOCABULARY)
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))) or GPT2_END not in vocabulary:
        raise ValueError(f"the ids in {VOCABULARY} are not those of a tokenizer of GPT-2")
    lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in merges):
        raise ValueError(f"a line of {MERGES} is no pair of pieces")
    end = vocabulary[GPT2_END]
    return JsonTokenizer(definition(pieces, merges, SPLITTINGS["gpt-2"], [end]), SpecialIds(bos=end, eos=end))


def template_in(path: Path) -> str:
    """The chat template in the folder of a tokenizer, or beside its file: in a file of its own, or in
    tokenizer_config.json, where it is named default if there are several. Nothing if there is none."""
    folder = path if path.is_dir() else path.parent
    file, config = folder / TEMPLATE_FILE, folder / CONFIG
    if file.is_file() and file.stat().st_size <= MOST_BYTES:
        return file.read_text(encoding="utf-8", errors="replace")
    found = None
    if config.is_file():
        with contextlib.suppress(OSError, ValueError):
            found = _object(config.read_text(encoding="utf-8"), CONFIG).get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _config_beside(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json beside a file says; nothing if there is none."""
    beside = path.parent / CONFIG
    return _object(beside.read_text(encoding="utf-8"), CONFIG) if beside.is_file() else {}


def _special_ids(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int | None]:
    """The ids of the special tokens that tokenizer_config.json names, by our names for them."""
    found = {}
    for ours, names in NAMES.items():
        said = [i for name in names if (i := _id_of(config.get(name), ids, name)) is not None]
        found[ours] = said[0] if said else None
    return found


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not JSON") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{name} is no JSON object")
    return contents


def _all_ids(contents: Mapping[str, Any]) -> dict[str, int]:
    """The ids of all pieces of a tokenizer.json, with those of added tokens."""
    try:
        vocabulary = contents["model"]["vocab"]
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
        return ids | {token["content"]: token["id"] for token in contents.get("added_tokens") or ()}
    except (KeyError, TypeError):
        raise ValueError("it is no tokenizer.json of Hugging Face") from None


def _id_of(token: Any, ids: Mapping[str, int], name: str) -> int | None:
    """The id of a token that tokenizer_config.json names as a text, or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return None
    if not isinstance(content, str) or content not in ids:
        raise ValueError(f"{CONFIG} has {name}={shown(content)}, which is in no vocabulary")
    return ids[content]
