"""Byte-level BPE (Radford et al. 2019) as a tokenizer.json: how a text is split before BPE, and what stands for a byte.

A text is split by regular expressions, and BPE merges the bytes of each part. Vocabularies write a byte as a printable
character: itself, or for bytes that are none, one of the characters from U+0100 on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.errors import UserError
from llmjax.ranges import shown

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENDINGS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_ENDINGS}|\p{{N}}|{_REST}"


@dataclasses.dataclass(frozen=True)
class Splitting:
    """How texts are split: by each of the expressions, one after the other.

    whole_words  whether a part that is in the vocabulary is one token, even if no merges lead to it
    """

    patterns: tuple[str, ...]
    whole_words: bool = False


# By the fact tokenizer.ggml.pre of GGUF files. The expressions are those of llama.cpp (src/llama-vocab.cpp).
SPLITTINGS = {
    "gpt-2": Splitting((GPT2,)),
    "smollm": Splitting((DIGIT, GPT2)),
    "llama-bpe": Splitting((LLAMA3,), whole_words=True),
    "qwen2": Splitting((QWEN2,)),
}
# Other names there for the same.
ALIASES = {
    "mpt": "gpt-2", "olmo": "gpt-2", "jais": "gpt-2", "phi-2": "gpt-2", "starcoder": "smollm", "refact": "smollm",
    "command-r": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + number): byte for number, byte in enumerate(others)}


def definition(
    pieces: Sequence[str],
    merges: Sequence[Sequence[str]],
    splitting: Splitting,
    special: Sequence[int],
    added: Sequence[int] = (),
    begin: int | None = None,
) -> str:
    """The contents of tokenizer.json.

    pieces   the pieces by their ids
    merges   the pairs of pieces that BPE merges, the first comes first
    special  ids that stand for no text
    added    ids of pieces that are cut out of a text before anything else, written as they are
    begin    the id that programs of Hugging Face put before a text
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in splitting.patterns
    ]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], **flags, "special": i in set(special)}
            for i in sorted({*special, *added})
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, plain]},
        "post_processor": None if begin is None else begin_with(begin, pieces[begin]),
        "decoder": {**plain, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitting.whole_words,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(contents, ensure_ascii=False)


def begin_with(i: int, piece: str) -> dict[str, Any]:
    """The part of tokenizer.json that puts the id `i` before a text."""
    begin: dict[str, Any] = {"SpecialToken": {"id": piece, "type_id": 0}}
    texts: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [begin, texts[0]],
        "pair": [begin, *texts],
        "special_tokens": {piece: {"id": piece, "ids": [i], "tokens": [piece]}},
    }


def splitting_named(name: Any) -> Splitting:
    """The splitting of a GGUF file. ValueError, as the end of a sentence, if it is not known."""
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in SPLITTINGS:
        raise ValueError(
            f"tokenizer.ggml.pre={shown(name)}, which is not known here, but only {', '.join((*SPLITTINGS, *ALIASES))}"
        )
    return SPLITTINGS[name]


def name_of(contents: Mapping[str, Any]) -> str:
    """The name in `SPLITTINGS` of how a tokenizer.json splits texts. UserError if it is none of them."""
    before = contents.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    patterns: list[str] = []
    for step in steps:
        if step.get("type") == "Split":
            patterns.append(step.get("pattern", {}).get("Regex", ""))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
        elif step.get("type") == "ByteLevel" and step.get("use_regex", True):
            patterns.append(GPT2)
    for name, splitting in SPLITTINGS.items():
        if splitting.patterns == tuple(patterns):
            return name
    raise UserError(
        f"the tokenizer splits texts in a way that has no name in GGUF files here ({', '.join(SPLITTINGS)}); export "
        "the model with --to hf"
    )
