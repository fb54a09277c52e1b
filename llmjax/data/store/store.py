"""A token store: a tokenized corpus on disk, read through memory maps. Training reads its documents from nowhere else.

    header.json               format, columns, tokenizer, counts and fingerprints (`StoreHeader`)
    tokens-00000.bin ...      little-endian token ids of all documents, one document after the other, in shards
    tokens_lengths.bin        int64 [documents]: the number of tokens of each document
    tokens_starts.bin         int64 [documents]: where the tokens of each document start, counted over all shards
    names-00000.bin ...       UTF-8 names of the documents, with names_lengths.bin and names_starts.bin
    num_bytes.bin             int64 [documents]: UTF-8 bytes of the text of each document
    hashes.bin                uint64 [documents]: hash of each document's record
    origins.bin               uint16 [documents]: the entry of data.sources from which each document comes
    blocks.bin                uint32 [blocks]: CRC-32 of each 64 KiB of the shards of all ragged columns, in order
    checksums.json            CRC-32 of header.json, blocks.bin and every column with one value for each document

The examples of a task may fill further columns (`data/examples/contract.py`): `source`, a second stream of tokens;
`weights`, the loss weights of the tokens as runs of (uint32 length, float32 weight); `turns`, where a long document is
cut, as uint32 positions; and `label`, int32 [documents].
Where documents are marked as held out, not chosen by their hashes, `held_out`, uint8 [documents], is 1 for them.

A store is built in a temporary folder, which is renamed when every byte is on disk, so an unfinished store is never
seen. The small files are checked each time the store is opened, each block of a shard when it is first read.
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
from llmjax.data.store.columns import HELD_OUT, StoreHeader, read_header, shard_name
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError


class RaggedColumn:
    """A column with any number of values for each document, in one or more shards. A document lies in one shard.

    lengths  int64 [documents], memory-mapped: the number of values of each document
    shards   the files of the column, as arrays

    Args:
      shards: the files of the column, as arrays.
      counts: the number of values in each shard.
      lengths: int64 [documents], the number of values of each document.
      starts: int64 [documents], where the values of each document start, counted over all shards.
    """

    def __init__(self, shards: Sequence[CheckedArray], counts: Sequence[int], lengths, starts):
        self.lengths, self._starts = lengths, starts
        self.shards = shards
        # Where each shard starts, counted in values over all shards.
        self._shard_starts = [0, *itertools.accumulate(counts)][:-1]

    def view(self, document: int, start: int, stop: int) -> np.ndarray:
        """Values start to stop - 1 of one document, without a copy."""
        first = int(self._starts[document])
        # The last shard that starts at or before the first value of the document.
        shard = bisect.bisect_right(self._shard_starts, first) - 1
        first -= self._shard_starts[shard]
        return self.shards[shard].view(first + start, first + stop)


class Store:
    """The tokenized documents of one corpus.

    A store can be pickled: another process receives the name of its folder and maps the files again.

    header          the StoreHeader
    lengths         int64 [documents], the tokens of each document, bos and eos included
    source_lengths  int64 [documents], the tokens of each document's second stream; None if the store has none
    num_bytes       int64 [documents], the UTF-8 bytes of each document's text
    hashes          uint64 [documents], the hash of each document's record
    origins         uint16 [documents], the entry of data.sources from which each document comes
    labels          int32 [documents], the class of each document; None if the store has none
    held_out        uint8 [documents], 1 for documents that are marked as held out; None if the hashes decide
    remake          a function that builds the store again, in the same folder, when a damaged block is read; None if
                    damage raises `DamagedError` instead

    The arrays are memory-mapped.
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
        self.held_out = fixed.get(HELD_OUT)

    def _open_ragged(self, fixed: Mapping[str, np.ndarray]) -> dict[str, RaggedColumn]:
        """Opens the ragged columns; `fixed` has the columns that are their indices."""
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
        """Tokens start to stop - 1 of one document, as a read-only view of the memory map. None is the end."""
        return self._view("tokens", document, start, stop)

    def source(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start to stop - 1 of the second stream of one document, as a read-only view of the memory map."""
        return self._view("source", document, start, stop)

    def weights(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The loss weights of tokens start to stop - 1 of one document as targets: float32 [stop - start]."""
        stop = int(self.lengths[document]) if stop is None else stop
        # Without this column every token has weight 1.
        if "weights" not in self._columns:
            return np.ones(stop - start, np.float32)
        runs = self._view("weights", document, 0, None)
        # Where each run ends, within the part that is asked for: a long document is not written out as a whole.
        ends = np.clip(np.cumsum(runs["length"], dtype=np.int64), start, stop)
        return np.repeat(runs["weight"], np.diff(ends, prepend=start))

    def turns(self, document: int) -> np.ndarray:
        """The positions at which one document is cut if it is longer than a row, ascending."""
        return self._view("turns", document, 0, None)

    def name(self, document: int) -> str:
        """The name of a document in the corpus, for example `json/decoder.py` or `poems.jsonl#17`."""
        # Indexing a range accepts negative numbers and raises IndexError beyond the end.
        document = range(len(self))[document]
        return self._view("names", document, 0, None).tobytes().decode("utf-8", "surrogateescape")

    def _view(self, name: str, document: int, start: int, stop: int | None) -> np.ndarray:
        """Values start to stop - 1 of one document in a ragged column.

        Raises IndexError if the document has no such values. If the block is damaged and `remake` is set, the store is
        built again first.
        """
        column = self._columns[name]
        length = int(column.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"document {document} has {length} {name}: cannot take {start} to {stop}")
        try:
            return column.view(document, start, stop)
        except DamagedError as error:
            self._make_again(error, column)
        # The store was built again and opened, so the second attempt reads the new files.
        return self._view(name, document, start, stop)

    def check_all(self) -> None:
        """Raises `DamagedError` if any block of a ragged column is damaged."""
        for column in self._columns.values():
            for shard in column.shards:
                shard.check_all()

    def _make_again(self, error: DamagedError, column: RaggedColumn) -> None:
        """Builds the store again in the middle of a run, at most once, after `column` raised `error`.

        Raises `error` if that is not possible, and UserError if the new store holds other documents.
        """
        with self._remaking:
            if not any(column is current for current in self._columns.values()):
                # Another thread read the same damage and has opened the new store since.
                return
            if self.remake is None:
                raise error
            # Cleared first: damage in the rebuilt store would otherwise rebuild it without end.
            remake, self.remake, before = self.remake, None, self.header
            remake(error)
            self._open()
            if self.header != before:
                raise UserError(f"{error.reason}, and data.sources hold other documents by now: start again.")

    def is_held_out(self, held_out_fraction: float) -> np.ndarray:
        """Whether each document is held out: bool [documents].

        A document is held out if hash / 2**64 < held_out_fraction. Equal records are therefore on the same side of the
        split, and adding documents to the corpus moves no other document to the other side. In a store that marks its
        held-out documents the marks decide, whatever the fraction is.
        """
        if not 0 <= held_out_fraction <= 1:
            raise UserError(f"data.held_out_fraction = {held_out_fraction} must lie in [0, 1].")
        if self.held_out is not None:
            return self.held_out.astype(bool)
        threshold = int(held_out_fraction * 2**64)
        # 2**64 does not fit into uint64.
        if threshold == 2**64:
            return np.ones(len(self), dtype=bool)
        return self.hashes < np.uint64(threshold)

    def split(self, held_out_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the training documents and of the held-out documents, int64, ascending.

        In a small corpus one of the two may be empty.
        """
        held_out = self.is_held_out(held_out_fraction)
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def __getstate__(self) -> Path:
        return self.directory.absolute()

    def __setstate__(self, directory: Path) -> None:
        Store.__init__(self, directory)


def open_store(directory: str | os.PathLike, tokenizer: Tokenizer | None = None) -> Store:
    """Opens the store in `directory`.

    Raises UserError if there is no store, if it is damaged, or if another tokenizer than `tokenizer` made it.
    """
    store = Store(directory)
    if tokenizer is not None and store.header.tokenizer_fingerprint != tokenizer.fingerprint:
        made_by = store.header.tokenizer_fingerprint
        raise UserError(
            f"store {str(directory)!r} was made by tokenizer {made_by[:12]} and not by the given "
            f"{tokenizer.fingerprint[:12]}: build it again, or give its own tokenizer."
        )
    return store
