"""Reads and changes the bytes of a SentencePiece model, which are a message of protocol buffers.

SentencePiece has no function for these changes, and the package protobuf is not needed for them. The message is
described in sentencepiece_model.proto of SentencePiece, its encoding in https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping

# The message `normalizer_spec { add_dummy_prefix: false }`. Appended to a model it overrides the model's own value,
# because a later value of a field takes the place of an earlier one.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# The numbers of fields: `pieces`, a message for each piece of the vocabulary, `trainer_spec`, `normalizer_spec`, and in
# the trainer's message `model_type` and `byte_fallback`.
_PIECES, _TRAINER, _NORMALIZER, _MODEL_TYPE, _BYTE_FALLBACK = 1, 2, 3, 3, 35
# The fields of the trainer's message with the names of special pieces.
_NAMES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
# The `model_type` of a unigram model, which is the default, and of BPE.
_UNIGRAM, _BPE = 1, 2
# The kinds of pieces, and the field of a piece that says its kind.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_KIND = 3
# The field `type: CONTROL` of a piece.
_CONTROL = b"\x18\x03"
# The wire types of fields: an integer of variable length, 8 bytes, bytes with their length before them, and 4 bytes.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def as_control(model: bytes, ids: Collection[int]) -> bytes:
    """Returns the model with the pieces `ids` as control symbols, which no text gives."""
    # A piece has no id in the file. Its number among the pieces is its id.
    out, number = [], 0
    for field, start, body, stop in _fields(model):
        if field == _PIECES:
            if number in ids:
                # The last value of a field counts. The message gets longer, so its length is written anew.
                body += _CONTROL
                out.append(model[start : start + 1] + _as_varint(len(body)) + body)
            else:
                out.append(model[start:stop])
            number += 1
        else:
            out.append(model[start:stop])
    return b"".join(out)


def is_unigram(model: bytes) -> bool:
    """Whether the model is a unigram model. Otherwise it merges pieces in an order, as BPE does."""
    kind = _UNIGRAM
    for field, _, trainer, _ in _fields(model):
        if field == _TRAINER:
            for inner, _, value, _ in _fields(trainer):
                kind = _varint(value, 0)[0] if inner == _MODEL_TYPE else kind
    return kind == _UNIGRAM


def piece_kinds(model: bytes) -> list[int]:
    """The kind of each piece, by its id: NORMAL, UNKNOWN, ..."""
    kinds = []
    for field, _, piece, _ in _fields(model):
        if field == _PIECES:
            found = [_varint(value, 0)[0] for inner, _, value, _ in _fields(piece) if inner == _KIND]
            kinds.append(found[-1] if found else NORMAL)
    return kinds


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """(number, start, content, stop) of each field of a message: start and stop are offsets in the message.

    Raises ValueError for an unknown wire type, and IndexError if the message is cut short.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        # The tag has the wire type in its last three bits, and the number of the field before them.
        kind, begin = tag & 7, at
        if kind == _BYTES:
            length, begin = _varint(message, at)
            at = begin + length
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} in a SentencePiece model")
        yield tag >> 3, start, message[begin:at], at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Reads an integer of variable length at the offset `at`, and returns it with the offset of its end.

    Each byte has seven bits, the lowest come first, and the highest bit of a byte says whether another one follows.
    """
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _as_varint(value: int) -> bytes:
    """Writes an integer that is not negative as `_varint` reads it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def bpe_model(
    pieces: Iterable[tuple[str, float, int]], names: Mapping[str, str] | None = None, adds_space: bool = True
) -> bytes:
    """A BPE model of these (piece, score, kind). It spells unknown characters in bytes.

    It changes nothing in a text, but may put a space before it. The ids are in the order of `pieces`.

    names       the pieces that are the special ones unk, bos, eos and pad, if they are not called as usual
    adds_space  whether a space is put before a text
    """
    out = [_message(_PIECES, _piece(*piece)) for piece in pieces]
    # model_type: BPE; byte_fallback: true.
    named = b"".join(_message(_NAMES[name], piece.encode()) for name, piece in (names or {}).items())
    out.append(_message(_TRAINER, _integer(_MODEL_TYPE, _BPE) + _integer(_BYTE_FALLBACK, 1) + named))
    # name: "identity"; add_dummy_prefix; remove_extra_whitespaces: false; escape_whitespaces: true.
    normalizer = _message(1, b"identity") + _integer(3, int(adds_space)) + _integer(4, 0) + _integer(5, 1)
    out.append(_message(_NORMALIZER, normalizer))
    return b"".join(out)


def with_more_ids(model: bytes, count: int) -> bytes:
    """The model with `count` more ids at the end, which no text gives.

    Some language models have more embeddings than their tokenizer has pieces.
    """
    return model + b"".join(_message(_PIECES, _piece(f"<padding_{i}>", 0.0, CONTROL)) for i in range(count))


def _piece(text: str, score: float, kind: int) -> bytes:
    return (
        _message(1, text.encode()) + bytes([2 << 3 | _FIXED32]) + struct.pack("<f", score) + _integer(3, kind)
    )


def _message(field: int, body: bytes) -> bytes:
    return _as_varint(field << 3 | _BYTES) + _as_varint(len(body)) + body


def _integer(field: int, value: int) -> bytes:
    return _as_varint(field << 3 | _VARINT) + _as_varint(value)
