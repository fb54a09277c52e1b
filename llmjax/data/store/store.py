"""A tokenized corpus on disk, read through memory maps: the one thing that training reads text from.

    header.json               format, token type, tokenizer, counts and fingerprints (`StoreHeader`)
    tokens-00000.bin ...      little-endian tokens, each document `[bos] tokens [eos]`, in one shard
    lengths.bin  starts.bin   int64 a document: its tokens, and where they start, counted over all shards
    num_bytes.bin  hashes.bin int64 UTF-8 bytes, uint64 hash of the text
    names.txt  name_starts.bin   names one after the other, and where each starts; read on demand
    blocks.bin                uint32 CRC-32 of each 64 KiB of the token shards, in order, and of names.txt
    checksums.json            CRC-32 of every other file

A store is built beside its place and renamed into it when every byte is on disk: a half-built one is never
seen. The small files are checked at every opening, tokens and names when they are first read.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from llmjax.data.checksums import (
    BLOCK_BYTES,
    CheckedArray,
    DamagedError,
    block_checksums,
    map_file,
    raise_other,
    verify,
    write_checksums,
)
from llmjax.data.sources.sources import ReadStats, SourceFile, read_documents
from llmjax.data.store.encode import Encoded, encode_batches, token_dtype
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import new_folder

FORMAT_VERSION = 2
SHARD_BYTES = 1 << 30
_COLUMNS = {"lengths": "<i8", "starts": "<i8", "num_bytes": "<i8", "hashes": "<u8", "name_starts": "<i8"}
# The files that are checked at every opening.
_WHOLE = ("header.json", "blocks.bin", *(f"{name}.bin" for name in _COLUMNS))
_BATCH_CHARS = 1 << 18  # what a worker gets at once; a longer document goes alone
_INLINE_BYTES = 2_000_000  # below this, starting processes costs more than they save


@dataclasses.dataclass(frozen=True)
class StoreHeader:
    """What header.json says.

    num_bytes            UTF-8 bytes of the documents' text: the denominator of bits per byte
    content_fingerprint  SHA-256 over every document's length and tokens, in order
    shard_tokens         tokens in each shard
    name_bytes           bytes of names.txt
    empty, skipped       documents left out for want of text, and for text that is not UTF-8
    replaced             documents in which U+FFFD stands for what was not UTF-8
    """

    format_version: int
    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    content_fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    shard_tokens: tuple[int, ...]
    name_bytes: int
    empty: int
    skipped: int
    replaced: int


class Store:
    """The documents of one corpus as tokens. Opened by `open_store`; picklable (memory maps are opened anew).

    header     StoreHeader
    lengths    int64 [documents], memory-mapped: tokens of each document, bos and eos included
    num_bytes  int64 [documents], memory-mapped: UTF-8 bytes of each document's text
    hashes     uint64 [documents], memory-mapped: hash of each document's text
    remake     None, or what builds the store again in its place when a damaged block is read
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.remake: Callable[[DamagedError], None] | None = None
        self._remaking = threading.Lock()
        self._open()

    def _open(self) -> None:
        self.header = _read_header(self.directory)
        columns = {
            name: map_file(self.directory / f"{name}.bin", dtype, self.header.num_documents)
            for name, dtype in _COLUMNS.items()
        }
        self.lengths, self.num_bytes = columns["lengths"], columns["num_bytes"]
        self.hashes = columns["hashes"]
        self._starts, self._name_starts = columns["starts"], columns["name_starts"]
        self._shard_starts = [0, *itertools.accumulate(self.header.shard_tokens)][:-1]
        parts = [
            (_shard_name(i), self.header.dtype, count) for i, count in enumerate(self.header.shard_tokens)
        ]
        parts.append(("names.txt", "u1", self.header.name_bytes))
        sums, checked = np.fromfile(self.directory / "blocks.bin", "<u4"), []
        for name, dtype, count in parts:
            blocks = -(-count * np.dtype(dtype).itemsize // BLOCK_BYTES)
            what = f"store {str(self.directory)!r}"
            checked.append(CheckedArray(self.directory / name, dtype, count, sums[:blocks], what))
            sums = sums[blocks:]
        *self._shards, self._names = checked

    def __len__(self) -> int:
        return self.header.num_documents

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of one document, as a read-only view of the memory map."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"document {document} has {length} tokens: cannot take {start} to {stop}")
        first = int(self._starts[document])
        shard = bisect.bisect_right(self._shard_starts, first) - 1
        first -= self._shard_starts[shard]
        part = self._shards[shard]
        try:
            return part.view(first + start, first + stop)
        except DamagedError as error:
            self._make_again(error, part)
        return self.tokens(document, start, stop)

    def name(self, document: int) -> str:
        """Where the document came from, for example `json/decoder.py` or `poems.jsonl#17`."""
        document = range(len(self))[document]
        stops = self._name_starts[document + 1 : document + 2].tolist() or [self.header.name_bytes]
        part = self._names
        try:
            line = part.view(int(self._name_starts[document]), stops[0]).tobytes()
        except DamagedError as error:
            self._make_again(error, part)
            return self.name(document)
        return line.removesuffix(b"\n").decode("utf-8", "surrogateescape")

    def check_all(self) -> None:
        """Raises `DamagedError` where any token or name is not what was written."""
        for part in (*self._shards, self._names):
            part.check_all()

    def _make_again(self, error: DamagedError, part: CheckedArray) -> None:
        """Has the store built again, once, in the middle of a run; its documents must come out the same."""
        with self._remaking:
            if not any(part is current for current in (*self._shards, self._names)):
                return  # another thread read the same damage a moment ago
            if self.remake is None:
                raise error
            remake, self.remake, before = self.remake, None, self.header
            remake(error)
            self._open()
            if self.header != before:
                raise UserError(f"{error.reason}, and data.sources hold other documents by now: start again.")

    def is_held_out(self, held_out_fraction: float) -> np.ndarray:
        """bool [documents]: hash / 2**64 < fraction. Equal texts share a side, and adding text moves none."""
        if not 0 <= held_out_fraction <= 1:
            raise UserError(f"data.held_out_fraction = {held_out_fraction} must lie in [0, 1].")
        threshold = int(held_out_fraction * 2**64)
        if threshold == 2**64:
            return np.ones(len(self), dtype=bool)
        return self.hashes < np.uint64(threshold)

    def split(self, held_out_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) document numbers, int64, ascending. Either may be empty in a small corpus."""
        held_out = self.is_held_out(held_out_fraction)
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def __getstate__(self) -> Path:
        return self.directory.absolute()

    def __setstate__(self, directory: Path) -> None:
        Store.__init__(self, directory)


def open_store(directory: str | os.PathLike, tokenizer: Tokenizer | None = None) -> Store:
    """Opens a finished store. `UserError` where it is none, is damaged, or was made by another tokenizer."""
    store = Store(directory)
    if tokenizer is not None and store.header.tokenizer_fingerprint != tokenizer.fingerprint:
        made_by = store.header.tokenizer_fingerprint
        raise UserError(
            f"store {str(directory)!r} was made by tokenizer {made_by[:12]} and not by the given "
            f"{tokenizer.fingerprint[:12]}: build it again, or give its own tokenizer."
        )
    return store


def build_store(
    directory: str | os.PathLike,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    on_bad_text: str = "error",
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Store:
    """Tokenizes the files into a store at `directory`, replacing what is there, and opens it.

    Its bytes depend on files and tokenizer, not on `num_workers`; the corpus streams through bounded memory.
    `progress(done, total)` is called with bytes of the files, as batches are finished. On any error, and on a
    kill, `directory` is as it was. Builders of the same directory do not disturb each other.
    """
    directory = Path(directory)
    total = sum(file.size for file in files)
    stats = ReadStats()
    header: list[StoreHeader] = []
    with new_folder(directory, lambda there: _is_whole(there, header[0])) as partial:
        with _Writer(partial, token_dtype(tokenizer.vocab_size), shard_bytes) as writer:
            batches = _read_batches(files, text_field, on_bad_text, stats)
            workers = num_workers if total >= _INLINE_BYTES else 1
            for (names, done), encoded in encode_batches(tokenizer, batches, workers):
                writer.add(names, encoded)
                if progress is not None:
                    progress(done, total)
        if not writer.num_documents:
            raise UserError(
                f"data.sources hold no document with text ({len(files)} files, {stats.empty} "
                f"documents empty, {stats.skipped} skipped): name sources with text."
            )
        header.append(writer.header(tokenizer, stats))
        _write_header(partial, header[0])
    if progress is not None:
        progress(total, total)
    return open_store(directory, tokenizer)


class _Writer:
    """Appends documents to shards and index columns."""

    def __init__(self, directory: Path, dtype: np.dtype, shard_bytes: int):
        self._directory, self._dtype = directory, dtype
        self._shard_capacity = max(shard_bytes // dtype.itemsize, 1)
        self._digest = hashlib.sha256()
        self._shard_tokens: list[int] = []
        self._name_bytes = 0
        self.num_documents = self._num_bytes = self._num_tokens = 0

    def __enter__(self) -> _Writer:
        self._files = contextlib.ExitStack()
        self._columns = {name: self._create(f"{name}.bin") for name in _COLUMNS}
        self._names = self._create("names.txt")
        self._shard: IO[bytes] | None = None
        return self

    def __exit__(self, *error) -> None:
        self._files.close()

    def _create(self, name: str) -> IO[bytes]:
        file = open(self._directory / name, "xb")  # noqa: SIM115 - closed by the exit stack
        self._files.callback(file.close)
        return file

    def add(self, names: Sequence[str], encoded: Encoded) -> None:
        tokens = encoded.tokens.astype(self._dtype, copy=False).data.cast("B")
        ends = np.cumsum(encoded.lengths)
        for stop, length in zip(ends.tolist(), encoded.lengths.tolist(), strict=True):
            data = tokens[(stop - length) * self._dtype.itemsize : stop * self._dtype.itemsize]
            self._digest.update(length.to_bytes(8, "little"))
            self._digest.update(data)
            self._shard_for(length).write(data)
            self._shard_tokens[-1] += length
        lines = [f"{name}\n".encode("utf-8", "surrogateescape") for name in names]
        name_ends = self._name_bytes + np.cumsum([len(line) for line in lines])
        self._write("lengths", encoded.lengths)
        self._write("starts", self._num_tokens + ends - encoded.lengths)
        self._write("num_bytes", encoded.num_bytes)
        self._write("hashes", encoded.hashes)
        self._write("name_starts", name_ends - [len(line) for line in lines])
        self._names.write(b"".join(lines))
        self._name_bytes = int(name_ends[-1])
        self._num_tokens += int(ends[-1])
        self._num_bytes += int(encoded.num_bytes.sum())
        self.num_documents += len(names)

    def _write(self, column: str, values: np.ndarray) -> None:
        self._columns[column].write(values.astype(_COLUMNS[column]).tobytes())

    def _shard_for(self, length: int) -> IO[bytes]:
        """The open shard, or a new one where the document does not fit: shards hold whole documents."""
        if self._shard is None or self._shard_tokens[-1] + length > self._shard_capacity:
            self._shard = self._create(_shard_name(len(self._shard_tokens)))
            self._shard_tokens.append(0)
        return self._shard

    def header(self, tokenizer: Tokenizer, stats: ReadStats) -> StoreHeader:
        return StoreHeader(
            format_version=FORMAT_VERSION,
            dtype=self._dtype.str,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            content_fingerprint=self._digest.hexdigest(),
            num_documents=self.num_documents,
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            shard_tokens=tuple(self._shard_tokens),
            name_bytes=self._name_bytes,
            empty=stats.empty,
            skipped=stats.skipped,
            replaced=stats.replaced,
        )


def _read_batches(
    files: Sequence[SourceFile], text_field: str, on_bad_text: str, stats: ReadStats
) -> Iterator[tuple[tuple[list[str], int], list[str]]]:
    """((names, bytes read so far), texts) of neighbouring documents, together about `_BATCH_CHARS` long."""
    names: list[str] = []
    texts: list[str] = []
    size = 0
    for file in files:
        for document in read_documents(file, text_field=text_field, on_bad_text=on_bad_text, stats=stats):
            names.append(document.name)
            texts.append(document.text)
            size += len(document.text)
            if size >= _BATCH_CHARS:
                yield (names, stats.bytes_read), texts
                names, texts, size = [], [], 0
    if texts:
        yield (names, stats.bytes_read), texts


def _read_header(directory: Path) -> StoreHeader:
    """The header, after checking that every file it speaks of has its size, and every small one its checksum."""
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
    header = StoreHeader(**{**fields, "shard_tokens": tuple(fields["shard_tokens"])})
    sizes = {f"{name}.bin": header.num_documents * np.dtype(kind).itemsize for name, kind in _COLUMNS.items()}
    sizes |= {_shard_name(i): n * np.dtype(header.dtype).itemsize for i, n in enumerate(header.shard_tokens)}
    sizes |= {"names.txt": header.name_bytes}
    for name, size in sizes.items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if found != size:
            raise DamagedError(f"{what} is damaged ({name} has {found} bytes, not {size})", "build it again")
    verify(directory, _WHOLE, "store")
    return header


def _write_header(directory: Path, header: StoreHeader) -> None:
    with open(directory / "header.json", "x") as file:
        json.dump(dataclasses.asdict(header), file, indent=2)
    shards = [_shard_name(i) for i in range(len(header.shard_tokens))]
    blocks = [block_checksums(directory / name) for name in (*shards, "names.txt")]
    np.concatenate(blocks).tofile(directory / "blocks.bin")
    write_checksums(directory, _WHOLE)


def _is_whole(directory: Path, header: StoreHeader) -> bool:
    """Whether `directory` holds, without any damage, a store with this header."""
    try:
        there = Store(directory)
        there.check_all()
    except UserError:
        return False
    return there.header == header


def _shard_name(i: int) -> str:
    return f"tokens-{i:05d}.bin"
