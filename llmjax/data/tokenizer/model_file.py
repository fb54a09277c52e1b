"""The bytes of a SentencePiece model (a protobuf), changed without the program that made it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

# Protobuf merges repeats: normalizer_spec { add_dummy_prefix: false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Numbers of fields: of the vocabulary, a message for each piece, and of the trainer and the kind of its models.
_PIECES, _TRAINER, _MODEL_TYPE = 1, 2, 3
_UNIGRAM = 1
# The kind of a piece (field 3): a control symbol.
_CONTROL = b"\x18\x03"


def as_control(model: bytes, ids: Collection[int]) -> bytes:
    """The model with the pieces `ids` as control symbols, which no text gives, however it is written."""
    out, number = [], 0
    for field, start, body, stop in _fields(model):
        if field == _PIECES:
            if number in ids:
                body += _CONTROL  # the last one counts
                out.append(model[start : start + 1] + _as_varint(len(body)) + body)
            else:
                out.append(model[start:stop])
            number += 1
        else:
            out.append(model[start:stop])
    return b"".join(out)


def is_unigram(model: bytes) -> bool:
    """Whether the pieces of the model are chosen by their probabilities, rather than merged in an order."""
    kind = _UNIGRAM
    for field, _, trainer, _ in _fields(model):
        if field == _TRAINER:
            for inner, _, value, _ in _fields(trainer):
                kind = _varint(value, 0)[0] if inner == _MODEL_TYPE else kind
    return kind == _UNIGRAM


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """(number, where it starts, its content, where it stops) of each field of a message."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind, begin = tag & 7, at
        if kind == 2:
            length, begin = _varint(message, at)
            at = begin + length
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} in a SentencePiece model")
        yield tag >> 3, start, message[begin:at], at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
