"""WordPiece (Schuster and Nakajima 2012) as BERT has it: a vocabulary, a piece a line, as a tokenizer.json.

Text is cleaned and cut into words at white space, punctuation and around each Chinese character; a vocabulary without
capitals also lowers them and takes accents off. So WordPiece does not give back the text that it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.data.tokenizer.vocabulary import is_ideograph

# The special pieces of BERT, by our names for what they do.
SPECIAL = {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
# What begins a piece that goes on with a word.
PREFIX = "##"
# Pieces that are kept free: no text gives them.
UNUSED = re.compile(r"\[unused\d+\]")
# Punctuation that follows a word without a space. A choice for texts that are shown; where spaces were is not known.
CLOSING = frozenset(".,!?;:)]}%")


def read_pieces(text: str) -> list[str]:
    """The pieces of vocab.txt by their ids. ValueError, as the end of a sentence, if it is no such vocabulary."""
    # Some pieces are line separators of Unicode, at which `splitlines` would cut.
    pieces = text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n").split("\n")
    if len(set(pieces)) < len(pieces):
        raise ValueError("it has a piece twice, which no vocabulary of WordPiece has")
    if SPECIAL["unk"] not in pieces:
        raise ValueError(f"it has no line {SPECIAL['unk']}, as each vocabulary of WordPiece has")
    return pieces


def definition(pieces: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The tokenizer.json of a vocabulary.

    settings  the contents of tokenizer_config.json. What it does not say about capitals, the vocabulary does: they are
              lowered if it has no piece `A`
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    lowers = settings.get("do_lower_case")
    begin, end = SPECIAL["bos"], SPECIAL["eos"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted((ids[piece], piece) for piece in SPECIAL.values() if piece in ids)
    single = [_special(begin), {"Sequence": {"id": "A", "type_id": 0}}, _special(end)]
    pair = [*single, {"Sequence": {"type_id": 1, "id": "B"}}, _special(end, 1)]
    around = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (begin, end)}
        if begin in ids and end in ids
        else {},
    }
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in special],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars") is not False,
            "strip_accents": settings.get("strip_accents"),
            "lowercase": lowers if isinstance(lowers, bool) else "A" not in ids,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": around if around["special_tokens"] else None,
        "decoder": {"type": "WordPiece", "prefix": PREFIX, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": SPECIAL["unk"],
            "continuing_subword_prefix": PREFIX,
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
    return json.dumps(contents, ensure_ascii=False)


def _special(piece: str, type_id: int = 0) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": type_id}}


def piece_bytes(piece: str, prefix: str = PREFIX) -> bytes:
    """The text of a piece: a word with a space before it, or the rest of one.

    Chinese characters and closing punctuation have no space. Pieces that are kept free have no text.
    """
    if UNUSED.fullmatch(piece):
        return b""
    if prefix and piece.startswith(prefix) and piece != prefix:
        return piece.removeprefix(prefix).encode()
    first = piece[:1]
    return ("" if first in CLOSING or _is_wide(first) else " ").encode() + piece.encode()


def _is_wide(character: str) -> bool:
    """Whether a character is a Chinese one or punctuation that goes with them."""
    return bool(character) and (
        is_ideograph(character) or "\u3000" <= character < "\u3040" or "\uff00" <= character < "\ufff0"
    )
