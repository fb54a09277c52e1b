"""A SentencePiece BPE model as the tokenizer.json that the package `tokenizers`, and so `transformers`, reads.

`transformers` can also read the SentencePiece model itself, but puts no space before a text that begins with one, which
SentencePiece does. The file written here gives the ids that SentencePiece gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# How SentencePiece writes a space.
SPACE_MARK = "\u2581"


def tokenizer_config(pieces: Mapping[str, str]) -> dict[str, Any]:
    """The contents of tokenizer_config.json. `pieces` are the special pieces, by their names there (bos_token)."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **pieces,
    }


def tokenizer_json(
    pieces: Sequence[str],
    scores: Sequence[float],
    special: Mapping[int, str],
    bos: int,
    unk: int,
    adds_space: bool,
) -> dict[str, Any]:
    """The contents of tokenizer.json.

    pieces      the pieces by their ids
    scores      their scores: of two possible merges, that of the better score comes first
    special     the control symbols by their ids, which stand for no text
    bos, unk    the ids of the piece that begins a text and of the unknown piece
    adds_space  whether the model puts a space before a text
    """
    mark: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    normalizers = [{"type": "Prepend", "prepend": SPACE_MARK}, mark] if adds_space else [mark]
    back = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    begin = {"SpecialToken": {"id": pieces[bos], "type_id": 0}}
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in sorted(special.items())],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"type_id": 0, "id": "B"}}],
            "special_tokens": {pieces[bos]: {"id": pieces[bos], "ids": [bos], "tokens": [pieces[bos]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unk],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces, scores, special),
        },
    }


def _merges(pieces: Sequence[str], scores: Sequence[float], special: Mapping[int, str]) -> list[list[str]]:
    """All pairs of pieces whose text together is a piece, in the order in which BPE merges them."""
    ids = {piece: i for i, piece in enumerate(pieces) if i not in special}
    found = []
    for piece, i in ids.items():
        # Pieces such as <0x0A> stand for a byte and are never merged.
        if len(piece) == 6 and piece.startswith("<0x"):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], i, ids[left], ids[right], [left, right]))
    return [pair for *_, pair in sorted(found)]
