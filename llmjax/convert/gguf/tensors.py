"""The tensors of a GGUF file, read one at a time, as floating-point numbers whatever type they are stored in."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from types import ModuleType

import numpy as np

from llmjax.convert.files.tensor_files import DTYPES
from llmjax.errors import UserError
from llmjax.gguf.header import Broken, Header, broken
from llmjax.ranges import shown


def package() -> ModuleType:
    """The package gguf, which knows all types of numbers. UserError if it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf; pip install llmjax[convert]") from None
    return gguf


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file.

    dtype   the name of its type there: F32, F16, BF16, Q4_K, ...
    offset  the number of bytes in the file before it
    size    its bytes
    """

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> np.ndarray:
        """The tensor: F32, F16 and BF16 as they are, all others as the float32 that they mean."""
        with open(self.path, "rb", buffering=0) as file:
            data = np.fromfile(file, np.uint8, self.size, offset=self.offset)
        if data.size != self.size:
            raise UserError(f"{self.path} ends before its last tensor; it is damaged, so fetch it again")
        if self.dtype in DTYPES:
            return data.view(DTYPES[self.dtype]).reshape(self.shape)
        gguf = package()
        rows = data.reshape(math.prod(self.shape[:-1]), -1)
        # A damaged scale may overflow, which is found where it is checked that all numbers are finite.
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[self.dtype]).reshape(self.shape)


def open_tensors(path: pathlib.Path, header: Header) -> dict[str, GgufTensor]:
    """The tensors of a file, none of them read.

    Raises UserError, in one sentence, if the bytes of one lie outside of the file or overlap those of another, or if
    its type is not known.
    """
    try:
        found = {name: _tensor(path, header, name) for name in header.tensors}
        at, before = header.start, "the header"
        for tensor, name in sorted((tensor.offset, name) for name, tensor in found.items()):
            if tensor < at:
                raise Broken(f"the bytes of {shown(name)} overlap those of {shown(before)}")
            at, before = tensor + found[name].size, name
        return found
    except Broken as why:
        raise broken(path, why) from None


def _tensor(path: pathlib.Path, header: Header, name: str) -> GgufTensor:
    gguf, entry = package(), header.tensors[name]
    try:
        kind = gguf.GGMLQuantizationType(entry.type)
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise Broken(f"the type {entry.type} of {shown(name)} is not known") from None
    if entry.shape[-1] % block:
        raise Broken(f"the rows of {shown(name)} are no multiple of {block}, which {kind.name} needs")
    size = math.prod(entry.shape) // block * bytes_of_block
    offset = header.start + entry.offset
    if offset + size > header.size:
        raise Broken(f"the bytes of {shown(name)} end at {offset + size}, and the file at {header.size}")
    if kind.name not in DTYPES and not _is_read(kind.name):
        raise UserError(
            f"{path} stores {shown(name)} as {kind.name}, which cannot be read here; use a file with F16, Q8_0 or Q4_K"
        )
    return GgufTensor(path, kind.name, entry.shape, offset, size)


def _is_read(name: str) -> bool:
    """Whether the package can make floating-point numbers of a type: it is tried with one block of zeros."""
    gguf = package()
    kind = gguf.GGMLQuantizationType[name]
    try:
        with np.errstate(all="ignore"):
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
