"""Writes a GGUF file, one tensor in memory at a time. What the bytes mean is explained in `llmjax/gguf/header.py`."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from llmjax.convert.files.tensor_files import DTYPES
from llmjax.convert.gguf.tensors import package
from llmjax.errors import UserError
from llmjax.gguf.header import ALIGNMENT, ARRAY, BOOL, MAGIC, STRING, VERSIONS


@dataclasses.dataclass(frozen=True)
class Written:
    """A type in which matrices are written, a value of --dtype.

    name  its name in the package gguf
    code  the number of the type of a file, general.file_type
    """

    name: str
    code: int


# By the names that --dtype has for them.
WRITTEN = {
    "float32": Written("F32", 0),
    "float16": Written("F16", 1),
    "bfloat16": Written("BF16", 32),
    "q8_0": Written("Q8_0", 7),
}
# The codes of the types of single facts.
WHOLE, FLOAT, SIGNED = 4, 6, 5


def type_of(shape: tuple[int, ...], dtype: str) -> str:
    """The type in which a tensor of this shape is written for a --dtype.

    llama.cpp wants vectors in float32. Rows that are no multiple of a block of Q8_0 are written in F16, as it does.
    """
    if len(shape) == 1:
        return "F32"
    name = WRITTEN[dtype].name
    block, _ = package().GGML_QUANT_SIZES[package().GGMLQuantizationType[name]]
    return "F16" if shape[-1] % block else name


def size_of(shape: tuple[int, ...], name: str) -> int:
    """The bytes of a tensor in a type."""
    block, size = package().GGML_QUANT_SIZES[package().GGMLQuantizationType[name]]
    return math.prod(shape) // block * size


def as_type(array: np.ndarray, name: str) -> np.ndarray:
    """The numbers of a float32 array as the bytes of a type."""
    if name in DTYPES:
        # An overflow is found by whoever checks that all numbers are finite.
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array.astype(DTYPES[name]))
    return package().quants.quantize(np.ascontiguousarray(array), package().GGMLQuantizationType[name])


def header_bytes(
    facts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]
) -> bytes:
    """The header of a file with these facts and tensors, up to where the bytes of the first tensor begin."""
    out = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(shapes), len(facts))]
    for name, value in facts.items():
        out += [_text(name), _value(value)]
    at = 0
    for name, shape in shapes.items():
        code = int(package().GGMLQuantizationType[types[name]])
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += [_text(name), dims, struct.pack("<IQ", code, at)]
        at += _padded(size_of(shape, types[name]))
    header = b"".join(out)
    return header + bytes(_padded(len(header)) - len(header))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A fact with its type before it. Whole numbers are unsigned, but signed in lists."""
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", WHOLE, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    head = "<IIQ"
    if all(isinstance(item, str) for item in value):
        return struct.pack(head, ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if all(isinstance(item, int) for item in value):
        return struct.pack(head, ARRAY, SIGNED, len(value)) + np.asarray(value, "<i4").tobytes()
    return struct.pack(head, ARRAY, FLOAT, len(value)) + np.asarray(value, "<f4").tobytes()


def write_file(
    path: pathlib.Path,
    facts: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    note: Callable[[str, np.ndarray], None] = lambda name, array: None,
) -> None:
    """Writes a new file.

    shapes   the shape of each tensor, by name, in the order in which `tensors` has them
    dtype    a key of `WRITTEN`
    tensors  float32 arrays; they may be made one at a time
    note     is told what was written of each tensor

    Raises UserError for a number that is not finite, or that the type cannot hold.
    """
    types = {name: type_of(shape, dtype) for name, shape in shapes.items()}
    with open(path, "xb") as file:
        file.write(header_bytes(facts, shapes, types))
        rest = iter(tensors)
        for name in shapes:
            found, array = next(rest)
            assert found == name, (found, name)
            _write_tensor(file, name, array, types[name], note)


def _write_tensor(
    file: BinaryIO, name: str, array: np.ndarray, kind: str, note: Callable[[str, np.ndarray], None]
) -> None:
    data = as_type(array, kind)
    finite = np.isfinite(array).all() and (
        kind not in DTYPES or np.isfinite(data.astype(np.float32, copy=False)).all()
    )
    if not finite:
        raise UserError(
            f"the tensor {name} is not finite as {kind}; write it as float32, or use another checkpoint"
        )
    note(name, data)
    data.tofile(file)
    file.write(bytes(_padded(data.nbytes) - data.nbytes))
