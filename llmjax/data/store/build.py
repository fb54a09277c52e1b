"""Builds a token store: reads the sources, encodes the records in worker processes, and writes the columns."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np

from llmjax.data.checksums import block_checksums, write_checksums
from llmjax.data.examples.contract import Examples, InParts, Structured, naming
from llmjax.data.examples.documents import Documents
from llmjax.data.sources.cutting import WHOLE, Cutting, cut_parts
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Reading, ReadStats, with_ends
from llmjax.data.sources.records import RecordPart, chunks_of, fields_within, places_of, whole
from llmjax.data.store.columns import (
    FORMAT_VERSION,
    HELD_OUT,
    Columns,
    StoreHeader,
    shard_name,
    token_dtype,
)
from llmjax.data.store.encode import Batch, Encoded, Piece, encode_batches
from llmjax.data.store.store import Store, open_store
from llmjax.data.tokenizer.cuts import PIECE_CHARS
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import new_folder

# The largest size of a shard of a ragged column; only a single longer document makes a larger one.
SHARD_BYTES = 1 << 30
# About how many characters a worker encodes at once: a batch ends with the record that reaches this number. A longer
# document goes alone, and one that is longer than a piece of its tokenizer goes in pieces.
_BATCH_CHARS = 1 << 18
# A corpus of fewer bytes is encoded in this process: starting workers would cost more time than they save.
_INLINE_BYTES = 2_000_000
# How many bytes of a long document are copied into its shard at once.
_COPY_BYTES = 1 << 20
# The default examples: every document is one stream of tokens, read from the field "text".
DOCUMENTS = Documents("text")
READING = Reading()


def build_store(
    directory: str | os.PathLike,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    *,
    examples: Examples = DOCUMENTS,
    reading: Reading = READING,
    cutting: Cutting = WHOLE,
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
      examples: the host half of the task, which makes an example of each record and names the fields it needs.
      reading: how the files are read; its fields are replaced by those of `examples`.
      cutting: how documents are cut into several, each of which is a document of the store.
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
        marks = (HELD_OUT,) if cutting.tail or any(file.held_out for file in files) else ()
        columns = Columns(token_dtype(tokenizer.vocab_size).str, (*examples.columns, *marks))
        with _Writer(partial, columns, shard_bytes) as writer:
            reading = dataclasses.replace(reading, fields=fields_within(examples.fields))
            batches = _read_batches(files, reading, cutting, tokenizer, examples, stats)
            workers = num_workers if total >= _INLINE_BYTES else 1
            for tag, encoded in encode_batches(tokenizer, examples, batches, workers):
                if tag.first and tag.last:
                    writer.add(tag, encoded)
                else:
                    writer.add_part(tag, encoded)
                if progress is not None:
                    progress(tag.done, total)
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


# What each record of a batch has one of.
_Of = TypeVar("_Of")


class _Tag(NamedTuple):
    """What goes with a batch of records.

    names, origins  of the records
    held_out        whether each record is marked as held out
    done            bytes of the files that are read so far
    first, last     whether a document begins and ends with the batch: false of a part of a long one
    hash            of the text of a long document up to here
    """

    names: list[str]
    origins: list[int]
    held_out: list[bool]
    done: int
    first: bool = True
    last: bool = True
    hash: int = 0

    def for_documents(self, counts: np.ndarray) -> _Tag:
        """The same for each document, of which each record has `counts`, int [records]."""

        def repeated(of_records: list[_Of]) -> list[_Of]:
            return [x for x, count in zip(of_records, counts, strict=True) for _ in range(count)]

        return self._replace(
            names=repeated(self.names), origins=repeated(self.origins), held_out=repeated(self.held_out)
        )


class _Writer:
    """Appends documents to the files of a store's columns. It must be used in a `with` statement.

    Args:
      directory: the folder of the store.
      columns: the columns of the store.
      shard_bytes: the largest size of a shard of a ragged column.
    """

    _long: IO[bytes]
    _long_bytes = 0

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

    def add(self, tag: _Tag, encoded: Encoded) -> None:
        """Appends encoded documents with their names and the numbers of their entries in data.sources."""
        tag = tag.for_documents(encoded.counts)
        # surrogateescape, because the name of a file may contain bytes that are not UTF-8.
        data = [name.encode("utf-8", "surrogateescape") for name in tag.names]
        name_lengths = np.array([len(one) for one in data], "<i8")
        ragged = {"names": (np.frombuffer(b"".join(data), "u1"), name_lengths), **encoded.ragged}
        for column, (values, lengths) in ragged.items():
            self._add_ragged(column, values, lengths)
        fixed = {"origins": np.array(tag.origins, "<u2"), **encoded.fixed, **self._marks(tag)}
        for column, values in fixed.items():
            self._write(column, values)
            if column in self._digests:
                self._digests[column].update(values.tobytes())
        self._num_bytes += int(encoded.fixed["num_bytes"].sum())
        self.num_documents += len(tag.names)

    def _marks(self, tag: _Tag) -> dict[str, np.ndarray]:
        """The column of held-out marks for the records of a batch, if the store has one."""
        return {HELD_OUT: np.array(tag.held_out, "u1")} if HELD_OUT in self._columns.optional else {}

    def add_part(self, tag: _Tag, encoded: Encoded) -> None:
        """Appends to the document under way.

        Its length, which comes first in the fingerprint, is known at its end; until then its tokens lie in a file of
        their own.
        """
        if tag.first:
            self._long = open(self._directory / "long.bin", "x+b")  # noqa: SIM115 - closed at its end, or by the stack
            self._files.callback(self._long.close)
            self._long_bytes = 0
        values, _ = encoded.ragged["tokens"]
        self._long.write(values.astype(self._columns.ragged["tokens"], copy=False).tobytes())
        self._long_bytes += int(encoded.fixed["num_bytes"][0])
        if tag.last:
            self._end_long(tag)

    def _end_long(self, tag: _Tag) -> None:
        column = "tokens"
        length = self._long.tell() // self._columns.ragged[column].itemsize
        self._digests[column].update(length.to_bytes(8, "little"))
        shard = self._shard_for(column, length)
        self._long.seek(0)
        while data := self._long.read(_COPY_BYTES):
            self._digests[column].update(data)
            shard.write(data)
        self._count(column, np.array([length], "<i8"))
        self._shards[column][-1] += length
        self._long.close()
        (self._directory / "long.bin").unlink()
        data = tag.names[0].encode("utf-8", "surrogateescape")
        self._add_ragged("names", np.frombuffer(data, "u1"), np.array([len(data)], "<i8"))
        for fixed, value in (
            ("origins", tag.origins[0]),
            ("num_bytes", self._long_bytes),
            ("hashes", tag.hash),
        ):
            self._write(fixed, np.array([value], self._columns.fixed[fixed]))
        for mark, marks in self._marks(tag).items():
            self._write(mark, marks)
            self._digests[mark].update(marks.tobytes())
        self._num_bytes += self._long_bytes
        self.num_documents += 1

    def _count(self, column: str, lengths: np.ndarray) -> None:
        """Writes where documents of these lengths begin, which follow what is there."""
        ends = np.cumsum(lengths)
        self._write(f"{column}_lengths", lengths)
        self._write(f"{column}_starts", self._sizes[column] + ends - lengths)
        self._sizes[column] += int(ends[-1])

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
        self._count(column, lengths)

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
    files: Sequence[SourceFile],
    reading: Reading,
    cutting: Cutting,
    tokenizer: Tokenizer,
    examples: Examples,
    stats: ReadStats,
) -> Iterator[tuple[_Tag, Batch]]:
    """Reads the records of the files in batches of about `_BATCH_CHARS` characters, and long documents in pieces.

    Yields each batch with its tag.
    """
    batch: list[tuple[RecordPart, SourceFile]] = []
    size = 0

    def finished() -> tuple[_Tag, Batch]:
        parts, origins = [part for part, _ in batch], [file.origin for _, file in batch]
        names, held_out = [part.record.name for part in parts], [part.held_out for part in parts]
        fields = [{**part.record.fields, **_places(file, examples)} for part, file in batch]
        return _Tag(names, origins, held_out, stats.bytes_read), fields

    for part, chunks, file in _documents(files, reading, cutting, examples, stats):
        record = part.record
        if chunks is not None:
            if batch:
                yield finished()
                batch, size = [], 0
            digest = hashlib.blake2b(digest_size=8)
            for text, first, last in with_ends(tokenizer.pieces(chunks)):
                digest.update(text.encode())
                number = int.from_bytes(digest.digest(), "big")
                tag = _Tag(
                    [record.name], [file.origin], [part.held_out], stats.bytes_read, first, last, number
                )
                yield tag, Piece({reading.fields[0]: text}, first, last)
            continue
        if isinstance(examples, Structured):
            with naming(record.name):
                examples.check(record.fields)
        batch.append((part, file))
        size += sum(len(value) for value in record.fields.values() if isinstance(value, str))
        if size >= _BATCH_CHARS:
            yield finished()
            batch, size = [], 0
    if batch:
        yield finished()


def _places(file: SourceFile, examples: Examples) -> dict[str, str]:
    """The fields about the place of a document that the task asks for."""
    return {name: value for name, value in places_of(file).items() if name in examples.fields}


def _documents(
    files: Sequence[SourceFile], reading: Reading, cutting: Cutting, examples: Examples, stats: ReadStats
) -> Iterator[tuple[RecordPart, Iterator[str] | None, SourceFile]]:
    """Every document with its file: a record, or a long one's first part and its text in chunks."""
    in_parts = isinstance(examples, InParts) and not examples.columns and len(reading.fields) == 1
    for file in files:
        parts = cut_parts(file, reading, stats, cutting)
        if not in_parts:
            yield from ((part, None, file) for part in whole(parts))
            continue
        for part in parts:
            is_long = not part.last or len(part.record.text) > PIECE_CHARS
            yield part, chunks_of(part, parts) if is_long else None, file


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
