"""The tokenizer of a GGUF file as one of ours, and back: SentencePiece ("llama" there), or byte-level BPE ("gpt2")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.formats.byte_bpe import definition, name_of, splitting_named
from llmjax.data.tokenizer.formats.bytes_as_bpe import as_bpe
from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer, SpecialIds
from llmjax.data.tokenizer.model_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, bpe_model
from llmjax.data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.gguf.header import read_header
from llmjax.ranges import shown

MODEL = "tokenizer.ggml.model"
TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
MERGES, SPLITTING = "tokenizer.ggml.merges", "tokenizer.ggml.pre"
ADDS_SPACE, DROPS_SPACES = "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces"
ADDS_BOS = "tokenizer.ggml.add_bos_token"
TEMPLATE = "tokenizer.chat_template"
# The facts about special tokens, by our names for them.
IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file. UserError, in one sentence, if it has none, or none that is read here."""
    facts = read_header(path).facts
    kind = facts.get(MODEL)
    if kind not in _READERS:
        raise UserError(
            f"{path} has {MODEL}={shown(kind)}, which is not known here; give the tokenizer of the model as a "
            "SentencePiece model or a tokenizer.json"
        )
    try:
        return _READERS[kind](facts)
    except (ValueError, RuntimeError) as why:
        if isinstance(why, UserError):
            raise
        raise UserError(f"the tokenizer in {path} cannot be read ({why}); give another") from None


def gguf_template(path: Path) -> str:
    """The chat template in a GGUF file; nothing if it has none."""
    found = read_header(path).facts.get(TEMPLATE)
    return found if isinstance(found, str) else ""


def _sentencepiece(facts: Mapping[str, Any]) -> Tokenizer:
    pieces, types = _pieces(facts)
    scores = _numbers(facts, SCORES, len(pieces))
    ids = _ids(facts, len(pieces))
    if facts.get(DROPS_SPACES):
        raise ValueError(f"{DROPS_SPACES} is not known here")
    names = {name: pieces[i] for name, i in ids.items() if name != "mask"}
    return SentencePieceTokenizer(
        bpe_model(zip(pieces, scores, types), names, adds_space=bool(facts.get(ADDS_SPACE, True)))
    )


def _byte_bpe(facts: Mapping[str, Any]) -> Tokenizer:
    pieces, types = _pieces(facts)
    merges = facts.get(MERGES)
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ValueError(f"{MERGES} is no list of texts")
    # The space between the two pieces is not the first character of the first.
    pairs = [(merge[: (cut := merge.find(" ", 1))], merge[cut + 1 :]) for merge in merges]
    silent = [i for i, kind in enumerate(types) if kind in (CONTROL, UNUSED, UNKNOWN)]
    added = [i for i, kind in enumerate(types) if kind == USER_DEFINED]
    ids = _ids(facts, len(pieces))
    begin = ids.get("bos") if facts.get(ADDS_BOS) is True else None
    text = definition(pieces, pairs, splitting_named(facts.get(SPLITTING)), silent, added, begin)
    return JsonTokenizer(text, SpecialIds(**ids))


# By the fact tokenizer.ggml.model.
_READERS = {"llama": _sentencepiece, "gpt2": _byte_bpe}


def _pieces(facts: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    pieces = facts.get(TOKENS)
    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise ValueError(f"{TOKENS} is no list of texts")
    if len(set(pieces)) < len(pieces):
        raise ValueError(f"{TOKENS} has a piece twice")
    types = [int(kind) for kind in _numbers(facts, TYPES, len(pieces), NORMAL)]
    if not set(types) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
        raise ValueError(f"{TYPES} has a kind of piece that is not known")
    return pieces, types


def _numbers(facts: Mapping[str, Any], name: str, count: int, default: float | None = None) -> list[float]:
    """The numbers of a fact, one for each piece. Without the fact each is the default."""
    values = facts.get(name)
    if values is None and default is not None:
        return [default] * count
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise ValueError(f"{name} is no list of {count} numbers")
    return values.tolist()


def _ids(facts: Mapping[str, Any], count: int) -> dict[str, int]:
    ids = {name: facts[fact] for name, fact in IDS.items() if fact in facts}
    # llama.cpp has no id of an unknown piece in its byte-level vocabularies, and writes the largest number.
    ids = {name: i for name, i in ids.items() if i != 2**32 - 1}
    for name, i in ids.items():
        if type(i) is not int or not 0 <= i < count:
            raise ValueError(f"{IDS[name]}={shown(i)} is no id")
    return ids


def gguf_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """The facts from which `read_gguf_tokenizer`, and llama.cpp, make the same tokenizer.

    Raises UserError if llama.cpp has no such tokenizer.
    """
    facts: dict[str, Any]
    if isinstance(tokenizer, SentencePieceTokenizer):
        facts = _of_sentencepiece(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        facts = _of_json(as_bpe(tokenizer))
    elif isinstance(tokenizer, JsonTokenizer):
        facts = _of_json(tokenizer)
    else:
        raise UserError(
            f"GGUF files have no tokenizer like {type(tokenizer).__name__}; export the model with --to hf"
        )
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "unk", "mask")}
    return {ADDS_BOS: True, **facts, **{IDS[name]: i for name, i in ids.items()}}


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    if not tokenizer.is_bpe:
        raise UserError(
            "GGUF files of these families have no unigram tokenizer, and none that changes texts; export the model "
            "with --to hf, or train one with tokenizer.kind=bpe"
        )
    pieces, scores = tokenizer.scored_pieces()
    return {
        MODEL: "llama",
        SPLITTING: "default",
        TOKENS: pieces,
        SCORES: scores,
        TYPES: tokenizer.piece_types(),
        ADDS_SPACE: bool(tokenizer.text_prefix),
    }


def _of_json(tokenizer: JsonTokenizer) -> dict[str, Any]:
    contents = json.loads(tokenizer.definition)
    # This raises for all but byte-level BPE.
    splitting = name_of(contents)
    # The package merges pairs of texts, and older files hold each pair as one text.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in contents["model"]["merges"]]
    pieces = [tokenizer.piece(i) or f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    added = {token["id"] for token in contents.get("added_tokens") or () if not token.get("special")}
    silent = [not tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size)]
    types = [CONTROL if silent[i] else USER_DEFINED if i in added else NORMAL for i in range(len(pieces))]
    return {
        MODEL: "gpt2",
        SPLITTING: splitting,
        TOKENS: pieces,
        TYPES: types,
        MERGES: merges,
        # Whether programs of Hugging Face put anything before a text is said by this part.
        ADDS_BOS: "SpecialToken" in json.dumps(contents.get("post_processor")),
    }
