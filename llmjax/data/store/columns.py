"""The columns of a token store: their files, their types, and the header that counts them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmjax.data.checksums import DamagedError, raise_other, verify

FORMAT_VERSION = 3

# Columns with any number of values for a document. Tokens take the type that the vocabulary needs.
RUN = np.dtype([("length", "<u4"), ("weight", "<f4")])
RAGGED: dict[str, np.dtype | None] = {"tokens": None, "names": np.dtype("u1"), "source": None, "weights": RUN}
# Columns with one value for a document.
FIXED = {name: np.dtype(kind) for name, kind in (("num_bytes", "<i8"), ("hashes", "<u8"), ("origins", "<u2"))}
LABEL = np.dtype("<i4")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns a store has, and their types: all that its files follow from.

    dtype     of token ids, such as "<u2"
    optional  those of `OPTIONAL_COLUMNS` in `data/examples/contract.py` that the task fills
    """

    dtype: str
    optional: tuple[str, ...] = ()

    @property
    def ragged(self) -> dict[str, np.dtype]:
        """Name -> type of one value, of the columns with any number of values for a document."""
        names = ("tokens", "names", *(name for name in self.optional if name in RAGGED))
        return {name: RAGGED[name] or np.dtype(self.dtype) for name in names}

    @property
    def fixed(self) -> dict[str, np.dtype]:
        """Name -> type of the columns with one value for a document, the index of the ragged ones included."""
        index = {f"{name}_{part}": np.dtype("<i8") for name in self.ragged for part in ("lengths", "starts")}
        return FIXED | index | ({"label": LABEL} if "label" in self.optional else {})


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What header.json says.

    columns              which columns there are
    shards               of each ragged column, the number of values in each of its files
    num_bytes            UTF-8 bytes of the documents' text: the denominator of bits per byte
    content_fingerprint  SHA-256 over every document's length and tokens, in order, and over the optional columns
    empty, skipped       documents left out for want of text, and for text that is not UTF-8
    replaced             documents in which U+FFFD stands for what was not UTF-8
    """

    format_version: int
    columns: Columns
    vocab_size: int
    tokenizer_fingerprint: str
    content_fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: Mapping[str, tuple[int, ...]]
    empty: int
    skipped: int
    replaced: int

    def checked_by_blocks(self) -> dict[str, tuple[np.dtype, int]]:
        """File name -> type and number of values, of the files that are checked as they are read, in order."""
        return {
            shard_name(column, i): (dtype, count)
            for column, dtype in self.columns.ragged.items()
            for i, count in enumerate(self.shards[column])
        }

    def checked_whole(self) -> tuple[str, ...]:
        """The names of the files that are checked at every opening."""
        return ("header.json", "blocks.bin", *(f"{name}.bin" for name in self.columns.fixed))


def shard_name(column: str, i: int) -> str:
    """The name of the file with part `i` of a ragged column."""
    return f"{column}-{i:05d}.bin"


def read_header(directory: Path) -> StoreHeader:
    """The header of the store in `directory`, once every file that it speaks of has its size, and every one that is
    checked whole its checksum; `DamagedError` otherwise."""
    what = f"store {str(directory)!r}"
    try:
        fields = json.loads((directory / "header.json").read_bytes())
        version = fields["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_other(error)
        raise DamagedError(f"{what} has no readable header.json", "build it again") from None
    if version != FORMAT_VERSION:
        raise DamagedError(f"{what} has format {version}, not {FORMAT_VERSION}", "rebuild it")
    verify(directory, ["header.json"], "store")
    columns = Columns(fields["columns"]["dtype"], tuple(fields["columns"]["optional"]))
    shards = {name: tuple(counts) for name, counts in fields["shards"].items()}
    header = StoreHeader(**{**fields, "columns": columns, "shards": shards})
    sizes = {f"{name}.bin": header.num_documents * dtype.itemsize for name, dtype in columns.fixed.items()}
    sizes |= {name: count * dtype.itemsize for name, (dtype, count) in header.checked_by_blocks().items()}
    for name, size in sizes.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if found != size:
            raise DamagedError(f"{what} is damaged ({name} has {found} bytes, not {size})", "build it again")
    verify(directory, header.checked_whole(), "store")
    return header
