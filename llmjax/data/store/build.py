"""Builds a token store: reads the sources, encodes the records in worker processes, and writes the columns."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from llmjax.data.checksums import block_checksums, write_checksums
from llmjax.data.examples.contract import Examples
from llmjax.data.examples.documents import Documents
from llmjax.data.sources.sources import ReadStats, Record, SourceFile, read_records
from llmjax.data.store.columns import (
    FORMAT_VERSION,
    Columns,
    StoreHeader,
    shard_name,
    token_dtype,
)
from llmjax.data.store.encode import Encoded, encode_batches
from llmjax.data.store.store import Store, open_store
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import new_folder

# The largest size of a shard of a ragged column; only a single longer document makes a larger one.
SHARD_BYTES = 1 << 30
# About how many characters a worker encodes at once: a batch ends with the record that reaches this number.
_BATCH_CHARS = 1 << 18
# A corpus of fewer bytes is encoded in this process: starting workers would cost more time than they save.
_INLINE_BYTES = 2_000_000
# The default examples: every document is one stream of tokens, read from the field "text".
DOCUMENTS = Documents("text")


def build_store(
    directory: str | os.PathLike,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    *,
    examples: Examples = DOCUMENTS,
    on_bad_text: str = "error",
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Store:
    """Encodes the records of the files into a store at `directory` and opens it. An older store there is replaced.

    The bytes of the store do not depend on `num_workers`. Records stream through a bounded amount of memory. If the
    build fails or is killed, `directory` stays as it was. Several processes may build the same directory at once.

    Args:
      directory: the folder of the store.
      files: the files of the corpus.
      tokenizer: encodes the text.
      examples: the host half of the task, which makes an example of each record.
      on_bad_text: what to do with text that is not UTF-8: "error", "skip" or "replace".
      num_workers: the number of processes that encode.
      progress: called as progress(done, total) after each batch, in bytes of the files.
      shard_bytes: the largest size of a shard.

    Raises UserError if no document has text.
    """
    directory = Path(directory)
    total = sum(file.size for file in files)
    stats = ReadStats()
    # The header is known only at the end of the block, when new_folder asks whether an existing store is the same.
    header: list[StoreHeader] = []
    with new_folder(directory, lambda there: _is_whole(there, header[0])) as partial:
        columns = Columns(token_dtype(tokenizer.vocab_size).str, tuple(examples.columns))
        with _Writer(partial, columns, shard_bytes) as writer:
            batches = _read_batches(files, examples.fields, on_bad_text, stats)
            workers = num_workers if total >= _INLINE_BYTES else 1
            for (names, origins, done), encoded in encode_batches(tokenizer, examples, batches, workers):
                writer.add(names, origins, encoded)
                if progress is not None:
                    progress(done, total)
        if not writer.num_documents:
            raise UserError(
                f"data.sources hold no document with text ({len(files)} files, {stats.empty} "
                f"documents empty, {stats.skipped} skipped): name sources with text."
            )
        header.append(writer.header(tokenizer, stats))
        _finish(partial, header[0])
    if progress is not None:
        progress(total, total)
    return open_store(directory, tokenizer)


class _Writer:
    """Appends documents to the files of a store's columns. It must be used in a `with` statement.

    Args:
      directory: the folder of the store.
      columns: the columns of the store.
      shard_bytes: the largest size of a shard of a ragged column.
    """

    def __init__(self, directory: Path, columns: Columns, shard_bytes: int):
        self._directory, self._columns, self._shard_bytes = directory, columns, shard_bytes
        # Each column has a digest of its own, so that a new optional column does not change the content fingerprint of
        # stores without it.
        self._digests = {name: hashlib.sha256() for name in ("tokens", *columns.optional)}
        # For each ragged column: the number of values in each shard, the open file, and the values in all shards.
        self._shards: dict[str, list[int]] = {name: [] for name in columns.ragged}
        self._open_shards: dict[str, IO[bytes]] = {}
        self._sizes = dict.fromkeys(columns.ragged, 0)
        self.num_documents = self._num_bytes = 0

    def __enter__(self) -> _Writer:
        self._files = contextlib.ExitStack()
        self._fixed = {name: self._create(f"{name}.bin") for name in self._columns.fixed}
        return self

    def __exit__(self, *error) -> None:
        self._files.close()

    def _create(self, name: str) -> IO[bytes]:
        file = open(self._directory / name, "xb")  # noqa: SIM115 - closed by the exit stack
        self._files.callback(file.close)
        return file

    def add(self, names: Sequence[str], origins: Sequence[int], encoded: Encoded) -> None:
        """Appends encoded documents with their names and the numbers of their entries in data.sources."""
        # surrogateescape, because the name of a file may contain bytes that are not UTF-8.
        data = [name.encode("utf-8", "surrogateescape") for name in names]
        name_lengths = np.array([len(one) for one in data], "<i8")
        ragged = {"names": (np.frombuffer(b"".join(data), "u1"), name_lengths), **encoded.ragged}
        for column, (values, lengths) in ragged.items():
            self._add_ragged(column, values, lengths)
        for column, values in {"origins": np.array(origins, "<u2"), **encoded.fixed}.items():
            self._write(column, values)
            if column in self._digests:
                self._digests[column].update(values.tobytes())
        self._num_bytes += int(encoded.fixed["num_bytes"].sum())
        self.num_documents += len(names)

    def _add_ragged(self, column: str, values: np.ndarray, lengths: np.ndarray) -> None:
        """Appends the values of some documents to a ragged column; lengths [documents] says how many each has."""
        dtype = self._columns.ragged[column]
        data = np.ascontiguousarray(values.astype(dtype, copy=False)).view("u1").data
        ends = np.cumsum(lengths)
        for stop, length in zip(ends.tolist(), lengths.tolist(), strict=True):
            part = data[(stop - length) * dtype.itemsize : stop * dtype.itemsize]
            if column in self._digests:
                # The length marks the border between documents, so that "ab", "c" and "a", "bc" differ.
                self._digests[column].update(length.to_bytes(8, "little"))
                self._digests[column].update(part)
            self._shard_for(column, length).write(part)
            self._shards[column][-1] += length
        self._write(f"{column}_lengths", lengths)
        self._write(f"{column}_starts", self._sizes[column] + ends - lengths)
        self._sizes[column] += int(ends[-1])

    def _write(self, column: str, values: np.ndarray) -> None:
        """Appends one value for each document to a fixed column."""
        self._fixed[column].write(values.astype(self._columns.fixed[column]).tobytes())

    def _shard_for(self, column: str, length: int) -> IO[bytes]:
        """The open shard of a column, or a new one if a document of `length` values does not fit into it."""
        capacity = max(self._shard_bytes // self._columns.ragged[column].itemsize, 1)
        counts = self._shards[column]
        if not counts or counts[-1] + length > capacity:
            self._open_shards[column] = self._create(shard_name(column, len(counts)))
            counts.append(0)
        return self._open_shards[column]

    def header(self, tokenizer: Tokenizer, stats: ReadStats) -> StoreHeader:
        """The header of the store with all documents that were added."""
        fingerprint = self._digests["tokens"]
        for column in self._columns.optional:
            fingerprint.update(column.encode() + self._digests[column].digest())
        return StoreHeader(
            format_version=FORMAT_VERSION,
            columns=self._columns,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            content_fingerprint=fingerprint.hexdigest(),
            num_documents=self.num_documents,
            num_tokens=self._sizes["tokens"],
            num_bytes=self._num_bytes,
            shards={column: tuple(counts) for column, counts in self._shards.items()},
            empty=stats.empty,
            skipped=stats.skipped,
            replaced=stats.replaced,
        )


def _read_batches(
    files: Sequence[SourceFile], fields: Sequence[str], on_bad_text: str, stats: ReadStats
) -> Iterator[tuple[tuple[list[str], list[int], int], list[dict[str, str | int]]]]:
    """Reads the records of the files in batches of about `_BATCH_CHARS` characters.

    Yields ((names, origins, bytes), fields): for each record its name, the number of its entry in data.sources and its
    fields, and the bytes of the files that were read so far.
    """
    batch: list[tuple[Record, int]] = []
    size = 0

    def finished():
        names, origins = [record.name for record, _ in batch], [origin for _, origin in batch]
        return (names, origins, stats.bytes_read), [record.fields for record, _ in batch]

    for file in files:
        for record in read_records(file, fields=fields, on_bad_text=on_bad_text, stats=stats):
            batch.append((record, file.origin))
            size += sum(len(value) for value in record.fields.values() if isinstance(value, str))
            if size >= _BATCH_CHARS:
                yield finished()
                batch, size = [], 0
    if batch:
        yield finished()


def _finish(directory: Path, header: StoreHeader) -> None:
    """Writes the header and the checksums, without which a folder of columns does not open as a store."""
    with open(directory / "header.json", "x") as file:
        json.dump(dataclasses.asdict(header), file, indent=2)
    blocks = [block_checksums(directory / name) for name in header.checked_by_blocks()]
    np.concatenate(blocks).tofile(directory / "blocks.bin")
    write_checksums(directory, header.checked_whole())


def _is_whole(directory: Path, header: StoreHeader) -> bool:
    """Whether `directory` holds an undamaged store with this header."""
    try:
        there = Store(directory)
        there.check_all()
    except UserError:
        return False
    return there.header == header
