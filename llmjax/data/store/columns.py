"""The columns of a token store: their names, types and files, and the header that describes a store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmjax.data.checksums import DamagedError, raise_unless_damage, verify

# The version of the store's files. A store of another version is built again.
FORMAT_VERSION = 3

# The type of `weights`: a run of `length` tokens that all have the same loss weight.
RUN = np.dtype([("length", "<u4"), ("weight", "<f4")])
# Ragged columns have any number of values for each document. None: the type follows from the size of the vocabulary.
RAGGED: dict[str, np.dtype | None] = {
    "tokens": None,
    "names": np.dtype("u1"),
    "source": None,
    "weights": RUN,
    "turns": np.dtype("<u4"),
}
# Fixed columns have one value for each document.
FIXED = {name: np.dtype(kind) for name, kind in (("num_bytes", "<i8"), ("hashes", "<u8"), ("origins", "<u2"))}
LABEL = np.dtype("<i4")
# The optional column, one byte for each document, that marks the held-out documents of a store which says so itself.
HELD_OUT = "held_out"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned little-endian type that holds every token id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a store. They decide which files the store has, and the type of each file.

    dtype     the numpy type of token ids, such as "<u2"
    optional  the columns out of `OPTIONAL_COLUMNS` in `data/examples/contract.py` that the task fills, and `HELD_OUT`
              if documents are marked as held out
    """

    dtype: str
    optional: tuple[str, ...] = ()

    @property
    def ragged(self) -> dict[str, np.dtype]:
        """The type of one value of each ragged column, by the name of the column."""
        names = ("tokens", "names", *(name for name in self.optional if name in RAGGED))
        return {name: RAGGED[name] or np.dtype(self.dtype) for name in names}

    @property
    def fixed(self) -> dict[str, np.dtype]:
        """The type of each fixed column, by the name of the column."""
        # A ragged column needs an index of two fixed columns: how many values a document has, and where they start.
        index = {f"{name}_{part}": np.dtype("<i8") for name in self.ragged for part in ("lengths", "starts")}
        optional: dict[str, np.dtype] = {"label": LABEL, HELD_OUT: np.dtype("u1")}
        return FIXED | index | {name: kind for name, kind in optional.items() if name in self.optional}


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """The content of header.json.

    columns              the columns of the store
    shards               the number of values in each file of each ragged column, by the name of the column
    num_bytes            the UTF-8 bytes of the text of all documents, the denominator of bits per byte
    content_fingerprint  SHA-256 over the length and the tokens of every document, in order, and the optional columns
    empty                the number of documents left out because they have no text
    skipped              the number of documents left out because their text is not UTF-8
    replaced             the number of documents in which U+FFFD replaces bytes that are not UTF-8
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
        """The type and the number of values of each file of the ragged columns, by the name of the file.

        These large files are checked in blocks when they are read. The checksums in blocks.bin have the same order.
        """
        return {
            shard_name(column, i): (dtype, count)
            for column, dtype in self.columns.ragged.items()
            for i, count in enumerate(self.shards[column])
        }

    def checked_whole(self) -> tuple[str, ...]:
        """The names of the small files, which are checked whole each time the store is opened."""
        return ("header.json", "blocks.bin", *(f"{name}.bin" for name in self.columns.fixed))


def shard_name(column: str, i: int) -> str:
    """The name of the file that holds shard `i` of a ragged column."""
    return f"{column}-{i:05d}.bin"


def read_header(directory: Path) -> StoreHeader:
    """Reads the header of the store in `directory` and checks the files of the store.

    Raises `DamagedError` if the header cannot be read, if the store has another format version, if a file has a wrong
    size, or if a small file does not match its checksum.
    """
    what = f"store {str(directory)!r}"
    try:
        fields = json.loads((directory / "header.json").read_bytes())
        version = fields["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_unless_damage(error)
        raise DamagedError(f"{what} has no readable header.json", "build it again") from None
    if version != FORMAT_VERSION:
        raise DamagedError(f"{what} has format {version}, not {FORMAT_VERSION}", "rebuild it")
    verify(directory, ["header.json"], "store")
    columns = Columns(fields["columns"]["dtype"], tuple(fields["columns"]["optional"]))
    shards = {name: tuple(counts) for name, counts in fields["shards"].items()}
    header = StoreHeader(**{**fields, "columns": columns, "shards": shards})
    # The size of every file follows from the header, so a truncated large file is found without reading it.
    sizes = {f"{name}.bin": header.num_documents * dtype.itemsize for name, dtype in columns.fixed.items()}
    sizes |= {name: count * dtype.itemsize for name, (dtype, count) in header.checked_by_blocks().items()}
    for name, size in sizes.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if found != size:
            raise DamagedError(f"{what} is damaged ({name} has {found} bytes, not {size})", "build it again")
    verify(directory, header.checked_whole(), "store")
    return header
