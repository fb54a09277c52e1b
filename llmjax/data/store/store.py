"""A tokenized corpus on disk, read through memory maps: the one thing that training reads text from.

    header.json               format, columns, tokenizer, counts and fingerprints (`StoreHeader`)
    tokens-00000.bin ...      little-endian tokens of every document, one document after the other, in shards
    tokens_lengths.bin        int64 a document: the number of its tokens
    tokens_starts.bin         int64 a document: where its tokens start, counted over all shards
    names-00000.bin ...       UTF-8 names of the documents, with names_lengths.bin and names_starts.bin
    num_bytes.bin hashes.bin  int64 UTF-8 bytes of the text, and uint64 hash of the record
    origins.bin               uint16 number of the entry of data.sources that the document comes from
    blocks.bin                uint32 CRC-32 of each 64 KiB of the shards of all columns, in order
    checksums.json            CRC-32 of every other file

Some tasks add columns (see `data/examples/contract.py`): `source`, a second stream of tokens; `weights`, the loss
weights of the tokens as runs of (uint32 length, float32 weight); and `label`, int32 a document.

A store is built beside its place and renamed into it when every byte is on disk: a half-built one is never
seen. The small files are checked at every opening, the shards block by block when they are first read.
"""

from __future__ import annotations

import bisect
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmjax.data.checksums import BLOCK_BYTES, CheckedArray, DamagedError, map_file
from llmjax.data.store.columns import StoreHeader, read_header, shard_name
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError


class RaggedColumn:
    """A column with any number of values for a document; each document lies whole within one shard.

    lengths  int64 [documents], memory-mapped: the number of values of each document
    """

    def __init__(self, shards: Sequence[CheckedArray], counts: Sequence[int], lengths, starts):
        self.lengths, self._starts = lengths, starts
        self.shards = shards
        self._shard_starts = [0, *itertools.accumulate(counts)][:-1]

    def view(self, document: int, start: int, stop: int) -> np.ndarray:
        """Values `start` to `stop` of one document, without a copy."""
        first = int(self._starts[document])
        shard = bisect.bisect_right(self._shard_starts, first) - 1
        first -= self._shard_starts[shard]
        return self.shards[shard].view(first + start, first + stop)


class Store:
    """The documents of one corpus as tokens. Opened by `open_store`; picklable (memory maps are opened anew).

    header          StoreHeader
    lengths         int64 [documents], memory-mapped: tokens of each document, bos and eos included
    source_lengths  int64 [documents], memory-mapped: tokens of each document's second stream; None without one
    num_bytes       int64 [documents], memory-mapped: UTF-8 bytes of each document's text
    hashes          uint64 [documents], memory-mapped: hash of each document's record
    origins         uint16 [documents], memory-mapped: which entry of data.sources each document comes from
    labels          int32 [documents], memory-mapped: the class of each document; None without one
    remake          None, or what builds the store again in its place when a damaged block is read
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.remake: Callable[[DamagedError], None] | None = None
        self._remaking = threading.Lock()
        self._open()

    def _open(self) -> None:
        self.header: StoreHeader = read_header(self.directory)
        fixed = {
            name: map_file(self.directory / f"{name}.bin", dtype, self.header.num_documents)
            for name, dtype in self.header.columns.fixed.items()
        }
        self._columns = self._open_ragged(fixed)
        self.lengths = fixed["tokens_lengths"]
        self.source_lengths = fixed.get("source_lengths")
        self.num_bytes, self.hashes, self.origins = fixed["num_bytes"], fixed["hashes"], fixed["origins"]
        self.labels = fixed.get("label")

    def _open_ragged(self, fixed: Mapping[str, np.ndarray]) -> dict[str, RaggedColumn]:
        # blocks.bin holds the checksums of all shards, one file after the other.
        sums, checked = np.fromfile(self.directory / "blocks.bin", "<u4"), {}
        for name, (dtype, count) in self.header.checked_by_blocks().items():
            blocks = -(-count * dtype.itemsize // BLOCK_BYTES)
            what = f"store {str(self.directory)!r}"
            checked[name] = CheckedArray(self.directory / name, dtype, count, sums[:blocks], what)
            sums = sums[blocks:]
        return {
            name: RaggedColumn(
                [checked[shard_name(name, i)] for i in range(len(counts))],
                counts,
                fixed[f"{name}_lengths"],
                fixed[f"{name}_starts"],
            )
            for name, counts in self.header.shards.items()
        }

    def __len__(self) -> int:
        return self.header.num_documents

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of one document, as a read-only view of the memory map."""
        return self._view("tokens", document, start, stop)

    def source(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of the second stream of one document, as a read-only view of the memory map."""
        return self._view("source", document, start, stop)

    def weights(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32 [stop - start], the loss weights of tokens `start` to `stop` of one document as targets."""
        stop = int(self.lengths[document]) if stop is None else stop
        if "weights" not in self._columns:
            return np.ones(stop - start, np.float32)
        runs = self._view("weights", document, 0, None)
        # Where each run ends, within the part that is asked for: a long document is not written out as a whole.
        ends = np.clip(np.cumsum(runs["length"], dtype=np.int64), start, stop)
        return np.repeat(runs["weight"], np.diff(ends, prepend=start))

    def name(self, document: int) -> str:
        """Where the document came from, for example `json/decoder.py` or `poems.jsonl#17`."""
        document = range(len(self))[document]
        return self._view("names", document, 0, None).tobytes().decode("utf-8", "surrogateescape")

    def _view(self, name: str, document: int, start: int, stop: int | None) -> np.ndarray:
        """Part of a ragged column. Where its file is damaged and `remake` is set, the store is built again first."""
        column = self._columns[name]
        length = int(column.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"document {document} has {length} {name}: cannot take {start} to {stop}")
        try:
            return column.view(document, start, stop)
        except DamagedError as error:
            self._make_again(error, column)
        return self._view(name, document, start, stop)

    def check_all(self) -> None:
        """Raises `DamagedError` where any value of a ragged column is not what was written."""
        for column in self._columns.values():
            for shard in column.shards:
                shard.check_all()

    def _make_again(self, error: DamagedError, column: RaggedColumn) -> None:
        """Has the store built again, once, in the middle of a run; its documents must come out the same."""
        with self._remaking:
            if not any(column is current for current in self._columns.values()):
                return  # another thread read the same damage a moment ago
            if self.remake is None:
                raise error
            remake, self.remake, before = self.remake, None, self.header
            remake(error)
            self._open()
            if self.header != before:
                raise UserError(f"{error.reason}, and data.sources hold other documents by now: start again.")

    def is_held_out(self, held_out_fraction: float) -> np.ndarray:
        """bool [documents]: hash / 2**64 < fraction. Equal records share a side, and adding documents moves none."""
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
