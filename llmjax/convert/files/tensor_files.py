"""Named tensors in files, read one at a time by their byte ranges: what all formats of weights have in common.

No file is mapped into memory or read as a whole, so that a model of any size needs host memory for one tensor.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from llmjax.errors import UserError

# The types of numbers that weights are stored in, by their names in safetensors files.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` is the number of bytes in `path` before it. `dtype` is a key of `DTYPES`."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor, in the type in which it is stored. UserError if the file has become shorter since."""
        dtype, count = DTYPES[self.dtype], math.prod(self.shape)
        # Unbuffered, so that exactly these bytes are read.
        with open(self.path, "rb", buffering=0) as file:
            flat = np.fromfile(file, dtype, count, offset=self.offset)
        if flat.size != count:
            raise UserError(f"{self.path} ends before its last tensor; it is damaged, so fetch it again")
        return flat.reshape(self.shape)


class Tensor(Protocol):
    """A tensor in a file of any format: what is known of it, and how it is read."""

    @property
    def dtype(self) -> str:
        """The name of the type in which it is stored."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, rows first."""

    def read(self) -> np.ndarray:
        """The tensor as floating-point numbers."""


# The tensors of a model, by the names that its files give them.
Tensors = Mapping[str, Tensor]
