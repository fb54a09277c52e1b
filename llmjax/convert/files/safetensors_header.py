"""Checks the header of a safetensors file before anything of it is used: a file may be cut short, damaged or hostile.

A file is the length of its header (8 bytes, little-endian), the header, which is a JSON object that gives the type, the
shape and the byte range of each tensor by its name, and then the bytes of the tensors. The format and its rules:
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from llmjax.convert.files.json_file import parse_object
from llmjax.convert.files.tensor_files import DTYPES, StoredTensor
from llmjax.errors import UserError
from llmjax.ranges import shown

# The longest header that the format allows, in bytes.
MOST_HEADER = 100_000_000
# The most dimensions of a tensor. A choice: no weight has as many.
MOST_DIMS = 8
# The entry of the header that is no tensor.
METADATA = "__metadata__"
# The types that the format has and that no weights of a language model are read from here, with their bytes.
OTHER_DTYPES = {
    "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E5M2": 1, "F8_E4M3": 1, "C64": 8,
}  # fmt: skip


# The bytes of a number of each type.
SIZES = {**{name: dtype.itemsize for name, dtype in DTYPES.items()}, **OTHER_DTYPES}
Tensors = dict[str, StoredTensor]


class _Broken(Exception):
    """What is wrong with a header, as the end of a sentence."""


def read_header(path: pathlib.Path, skips: Callable[[str], bool] = lambda name: False) -> Tensors:
    """The tensors of a safetensors file, by name, none of them read.

    skips  says of the name of a tensor whether it is never read, so that it may be of any type

    Raises UserError, in one sentence, for a file that breaks a rule of the format, and for a type of numbers that no
    weights are read from here.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER):
                raise _Broken(f"it has {size} bytes, and its header should have {length}")
            entries = _parse(file.read(length))
        return _tensors(path, entries, skips, start=8 + length, size=size)
    except _Broken as why:
        raise UserError(f"{path} is no whole safetensors file ({why}); fetch or write it again") from None


def _parse(text: bytes) -> dict[str, Any]:
    """The entries of the header. Raises _Broken where it is no JSON object, or has a name twice in any object."""
    try:
        entries = parse_object(text)
    except ValueError as why:
        raise _Broken(f"of its header: {why}") from None
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken(f"{METADATA} in its header is no table of texts")
    return entries


def _tensors(
    path: pathlib.Path, entries: dict[str, Any], skips: Callable[[str], bool], start: int, size: int
) -> Tensors:
    """The checked entries of a header. `start` is where the bytes of the tensors begin, in a file of `size` bytes."""
    found, ranges = {}, []
    for name, entry in entries.items():
        dtype, shape, (begin, end) = _entry(name, entry)
        if dtype not in DTYPES and not skips(name):
            raise UserError(
                f"{path} stores {shown(name)} as {dtype}, which is not read here; save the model as "
                f"{' or '.join(DTYPES)}"
            )
        if end - begin != math.prod(shape) * SIZES[dtype]:
            raise _Broken(f"the bytes of {shown(name)} are not those of {dtype} {list(shape)}")
        ranges.append((begin, end, name))
        found[name] = StoredTensor(path, dtype, shape, start + begin)
    # The tensors follow each other without a hole and without an overlap, and fill the file.
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise _Broken(f"the bytes of {shown(name)} do not begin where those before it end")
        at = end
    if start + at != size:
        raise _Broken(f"it has {size} bytes, and its header describes {start + at}")
    return found


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """The type, shape and byte range of an entry. Raises _Broken where they are not what the format wants."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Broken(f"{shown(name)} in its header is no tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise _Broken(f"the type {shown(dtype)} of {shown(name)} is not known")
    if not _are_sizes(shape) or len(shape) > MOST_DIMS:
        raise _Broken(f"the shape {shown(shape)} of {shown(name)} is none")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Broken(f"the byte range {shown(offsets)} of {shown(name)} is none")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    """Whether `values` is a list of whole numbers that are not negative and that a file may have."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
