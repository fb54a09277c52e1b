"""Reads the header of a GGUF file (llama.cpp): its table of facts and its list of tensors, each checked before use.

A file is the letters GGUF, a version, the number of tensors and of facts, then the facts (name, type, value), then the
tensors (name, dimensions, type of numbers, offset), and then the numbers, aligned. A file may be cut short, damaged or
hostile, so that no count or length in it is believed before it is known that the file is long enough for it. The
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The file lies outside of `convert`, because a GGUF file holds a tokenizer as well.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
from typing import Any, BinaryIO

import numpy as np

from llmjax.errors import UserError
from llmjax.ranges import shown

MAGIC = b"GGUF"
# The versions that are read. Version 1 had other lengths, and is no longer written since 2023.
VERSIONS = (2, 3)
# The types of numbers of facts by their codes, and the codes of the three other types.
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9
# The most dimensions of a tensor, as in llama.cpp.
MOST_DIMS = 4
# The most bytes of an array of numbers. A choice: vocabularies have some MB.
MOST_BYTES = 2**28
# What the bytes of tensors are aligned to if the file does not say it.
ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in the list: its shape, rows first, the code of its type, and its offset among the bytes of tensors."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What the header says.

    facts    the value of each fact by its name: a number, a bool, a text, a NumPy array of numbers, or a list of texts
    tensors  the tensors by their names
    start    the offset in the file at which the bytes of tensors begin
    size     the bytes of the file
    """

    facts: dict[str, Any]
    tensors: dict[str, Entry]
    start: int
    size: int


class Broken(Exception):
    """What is wrong with a file, as the end of a sentence."""


def broken(path: pathlib.Path, why: Broken) -> UserError:
    """The error for a damaged file."""
    return UserError(f"{path} is no whole GGUF file ({why}); fetch or write it again")


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a file begins as a GGUF file, or is called so."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


def read_header(path: pathlib.Path) -> Header:
    """The checked header of a file. Raises UserError, in one sentence, if it breaks a rule of the format."""
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            return _read(_Reader(file, os.fstat(file.fileno()).st_size))
    except Broken as why:
        raise broken(path, why) from None


class _Reader:
    """Reads values one after the other. Raises Broken where the file ends before one."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self.size, self.at = file, size, 0

    def bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise Broken(f"it ends within {what}")
        self.at += count
        return self._file.read(count)

    def whole(self, form: str, what: str) -> int:
        return struct.unpack(form, self.bytes(struct.calcsize(form), what))[0]

    def count(self, what: str, least: int) -> int:
        """A number of things that have at least `least` bytes each."""
        count = self.whole("<Q", what)
        if count * least > self.size - self.at:
            raise Broken(f"it is too short for {count} of {what}")
        return count

    def text(self, what: str) -> str:
        data = self.bytes(self.count(f"bytes of {what}", 1), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise Broken(f"{what} is no UTF-8") from None

    def value(self, code: int, what: str) -> Any:
        if code in NUMBERS:
            dtype = np.dtype(NUMBERS[code])
            return np.frombuffer(self.bytes(dtype.itemsize, what), dtype)[0].item()
        if code == BOOL:
            return bool(self.whole("<B", what))
        if code == STRING:
            return self.text(what)
        if code == ARRAY:
            return self.array(what)
        raise Broken(f"the type {code} of {what} is not known")

    def array(self, what: str) -> Any:
        code = self.whole("<I", what)
        if code == STRING:
            return [self.text(what) for _ in range(self.count(what, 8))]
        if code not in (*NUMBERS, BOOL):
            raise Broken(f"the type {code} of the values of {what} is not known")
        dtype = np.dtype(NUMBERS.get(code, "?"))
        count = self.count(what, dtype.itemsize)
        if count * dtype.itemsize > MOST_BYTES:
            raise Broken(f"{what} has {count} values")
        return np.frombuffer(self.bytes(count * dtype.itemsize, what), dtype)


def _read(reader: _Reader) -> Header:
    if reader.bytes(4, "its first letters") != MAGIC:
        raise Broken("it does not begin with the letters GGUF")
    version = reader.whole("<I", "its version")
    if version not in VERSIONS:
        raise Broken(f"it is of version {version}, and {' and '.join(map(str, VERSIONS))} are read")
    # A tensor has 32 bytes in the list at least, and a fact 13.
    num_tensors, num_facts = reader.count("tensors", 32), reader.count("facts", 13)
    facts: dict[str, Any] = {}
    for _ in range(num_facts):
        name = reader.text("the name of a fact")
        if name in facts:
            raise Broken(f"the fact {shown(name)} is in it twice")
        facts[name] = reader.value(reader.whole("<I", "a fact"), shown(name))
    tensors: dict[str, Entry] = {}
    for _ in range(num_tensors):
        name = reader.text("the name of a tensor")
        if name in tensors:
            raise Broken(f"the tensor {shown(name)} is in it twice")
        tensors[name] = _entry(reader, name)
    align = facts.get("general.alignment", ALIGNMENT)
    if type(align) is not int or not 0 < align <= 2**16 or align % 8:
        raise Broken(f"its alignment is {shown(align)}")
    return Header(facts, tensors, -(-reader.at // align) * align, reader.size)


def _entry(reader: _Reader, name: str) -> Entry:
    dims = reader.whole("<I", shown(name))
    if not 1 <= dims <= MOST_DIMS:
        raise Broken(f"{shown(name)} has {dims} dimensions")
    shape = [reader.whole("<Q", shown(name)) for _ in range(dims)]
    if not all(0 < size < 2**40 for size in shape):
        raise Broken(f"the shape {shape[::-1]} of {shown(name)} is none")
    kind, offset = reader.whole("<I", shown(name)), reader.whole("<Q", shown(name))
    # The format has the dimension whose numbers lie side by side first.
    return Entry(tuple(shape[::-1]), kind, offset)
