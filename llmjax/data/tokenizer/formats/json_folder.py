"""The tokenizer files of a folder of Hugging Face: tokenizer.json, or vocab.json with merges.txt, as GPT-2 has them.

Which tokens begin and end a text is said in a file beside them, tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.data.tokenizer.formats.byte_bpe import SPLITTINGS, definition
from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer, SpecialIds
from llmjax.ranges import shown

CONFIG, VOCABULARY, MERGES = "tokenizer_config.json", "vocab.json", "merges.txt"
# The token that begins and ends texts of GPT-2.
GPT2_END = "<|endoftext|>"
# The names of the special tokens there, by ours.
NAMES = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token", "unk": "unk_token", "mask": "mask_token"}


def read_tokenizer_json(path: Path) -> JsonTokenizer:
    """The tokenizer in the file `path`. ValueError, as the end of a sentence, if it is none that is read here."""
    text = path.read_text(encoding="utf-8")
    contents = _object(text, path.name)
    ids = _all_ids(contents)
    beside = path.parent / CONFIG
    config = _object(beside.read_text(encoding="utf-8"), CONFIG) if beside.is_file() else {}
    found = {ours: _id_of(config.get(theirs), ids, theirs) for ours, theirs in NAMES.items()}
    return JsonTokenizer(text, SpecialIds(**found))


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
