"""Makes batches from a store and a packing plan. This is the only file that imports grain.

Packed sequence number i is a pure function of (data, seed, i): it is a row of the plan, in an order of the rows that
differs in every epoch. The only state of the pipeline is one integer, the data cursor: the number of sequences
consumed. It is restored without reading any data, is the same on 1, 2 or 64 hosts, and does not depend on how many
sequences a micro-batch or an update has.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from llmjax.data.layout.layout import Arrays, RowLayout, lay_out
from llmjax.data.packing.order import permute
from llmjax.data.packing.plan import PackingPlan
from llmjax.data.packing.shorten_rows import cut_rows
from llmjax.data.sources.cutting import compile_split_on
from llmjax.data.sources.reading import BAD_TEXT, ENCODING, MAX_EXPANSION, Reading, check_encoding
from llmjax.errors import UserError
from llmjax.names import plain_name
from llmjax.ranges import Range, Unset, check_ranges

if TYPE_CHECKING:
    import grain

# The number of micro-batches of a stream without an end: grain needs a length, and no run reaches this one.
FOREVER = 2**48
# The values of data.hold_out.
HOLD_OUT = ("auto", "documents", "tails")
# The layout that moves no token.
AS_PACKED = RowLayout()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section of the config.

    sources            the files that are read: files, directories, globs, or "stdlib"
    text_field         the field of JSON lines, Parquet rows and tables that holds the text
    columns            the names of the columns of .csv and .tsv files; () means that their first line has them
    on_bad_text        what to do with text that is not of the encoding, and with null: "error", "skip" the document, or
                       "replace" the bytes (and skip null)
    encoding           the encoding of text, JSON and tables, by any name that Python knows
    follow_links       whether links that lead out of a folder which is searched are followed
    max_expansion      how many times its own size a compressed file may unpack to; the first 16 MiB always may
    seq_len            T, the positions of a packed sequence
    source_len         S, the positions of the second stream in a sequence, for tasks that have one; 0 means seq_len
    length_points      the lengths of the rows into which sequences are cut as training goes on
                       (`train/steering/length_schedule.py`)
    held_out_fraction  the fraction of the text that is held out; 0 holds out none
    hold_out           what is held out: "documents", whole ones, chosen by a hash of each record; "tails", the last
                       characters of each document; or "auto", documents if they are a fair sample, otherwise tails
                       (`build/hold_out.py`)
    held_out_sources   files, directories and globs that are the held-out text instead of a fraction of the sources
    split_on           a regular expression at whose matches documents are cut into several (`sources/cutting.py`); ""
                       cuts none
    cache_dir          the folder of cached tokenizers and token stores; "" means $XDG_CACHE_HOME/llmjax or
                       ~/.cache/llmjax
    num_workers        the number of processes that tokenize; 0 means one per core
    prefetch           the number of micro-batches that a thread makes ahead of the step; 0 means none, and no thread
    """

    sources: tuple[str, ...]
    text_field: str
    on_bad_text: str
    seq_len: Annotated[int, Range(1, 2**30)]
    held_out_fraction: Annotated[float, Range(0, 1, below=True)]
    cache_dir: str
    num_workers: Annotated[int, Range(1, 1024, "one per core")]
    prefetch: Annotated[int, Range(1, 1024, "none")]
    length_points: Annotated[tuple[str, ...], Unset(())]
    source_len: Annotated[int, Range(1, 2**30, "data.seq_len"), Unset(0)]
    encoding: Annotated[str, Unset(ENCODING)]
    follow_links: Annotated[bool, Unset(False)]
    max_expansion: Annotated[int, Range(1, 2**30), Unset(MAX_EXPANSION)]
    hold_out: Annotated[str, Unset("documents")]
    held_out_sources: Annotated[tuple[str, ...], Unset(())]
    split_on: Annotated[str, Unset("")]
    columns: Annotated[tuple[str, ...], Unset(())]

    def __post_init__(self):
        check_ranges("data", self)
        _require(self.sources, self, "sources", "must name at least one file, directory or glob")
        _require(
            self.text_field, self, "text_field", "must name a field of the JSON lines, Parquet rows or tables"
        )
        _require(self.on_bad_text in BAD_TEXT, self, "on_bad_text", f"must be one of {', '.join(BAD_TEXT)}")
        check_encoding(self.encoding)
        _require(self.hold_out in HOLD_OUT, self, "hold_out", f"must be one of {', '.join(HOLD_OUT)}")
        compile_split_on(self.split_on)
        _require(
            len({*self.columns}) == len(self.columns), self, "columns", "must name each column only once"
        )
        _require(
            not self.columns or self.text_field in self.columns,
            self,
            "columns",
            f"must name data.text_field={self.text_field!r}, the column of the text",
        )

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading((self.text_field,), self.on_bad_text, self.encoding, self.max_expansion, self.columns)


def _require(holds: Any, config: DataConfig, key: str, rule: str) -> None:
    """Raises UserError, which names the key, its value and the rule, unless `holds` is true."""
    if not holds:
        raise UserError(f"data.{key}={getattr(config, key)!r} {rule}")


# The additional fields of a batch that each optional column of the store fills (`data/examples/contract.py`). `weights`
# fills a field that every batch has.
FIELDS_OF_COLUMN = {
    "weights": (),
    "source": ("source_tokens", "source_segments", "source_positions"),
    "label": ("labels",),
    "turns": (),
}


class PackedSequences:
    """Random access to packed sequences by number. It can be pickled if the store can.

    Args:
      store: a `Store`, or an object with its methods `tokens` and `name`, and `weights`, `source` and `labels` if
        `columns` names them.
      plan: which pieces of which documents share a row.
      seed: decides the order of the rows in each epoch.
      repeat: what the sequence numbers from `plan.num_rows` on mean. True, for training: the next epochs. False, for
        evaluation: rows of padding, which fill the last batch without any effect on the sums.
      columns: the optional columns of the store that the batches contain.
    """

    def __init__(
        self,
        store: Any,
        plan: PackingPlan,
        seed: int,
        *,
        repeat: bool = True,
        columns: tuple[str, ...] = (),
    ):
        if not plan.num_rows:
            raise ValueError("The plan is empty: there are no sequences to read.")
        self.store, self.plan, self.seed, self.repeat, self.columns = store, plan, seed, repeat, columns

    def read(self, indices: np.ndarray) -> Arrays:
        """Reads the sequences with the numbers `indices`, int [B], as the fields of a `Batch`: [B, T], and `index` [B].

        Positions count from 0 in each piece, even if the piece continues a document that is longer than T. Padding is 0
        in all fields. `index` is the sequence number modulo 2**31.
        """
        indices = np.asarray(indices, np.int64)
        counts, pieces = self._pieces(indices)
        columns = (self.plan.docs[pieces], self.plan.starts[pieces], self.plan.lengths[pieces])
        remaining = zip(*(values.tolist() for values in columns))
        shape = (len(indices), self.plan.seq_len)
        # Flat arrays, in which each piece is one slice. The loop below runs once for each piece, so its body is short.
        flat = np.zeros((4, shape[0] * shape[1]), np.int32)
        tokens, targets, segments, positions = flat
        count_up = np.arange(shape[1], dtype=np.int32)
        for row, count in enumerate(counts.tolist()):
            # Pieces lie one after the other from the beginning of the row; the rest stays 0, which is padding.
            at = row * shape[1]
            for segment, (doc, start, length) in enumerate(itertools.islice(remaining, count), 1):
                stop = at + length
                # One token more than positions: position i reads token i and predicts token i + 1.
                piece = self.store.tokens(doc, start, start + length + 1)
                tokens[at:stop] = piece[:-1]
                targets[at:stop] = piece[1:]
                segments[at:stop] = segment
                positions[at:stop] = count_up[:length]
                at = stop
        tokens, targets, segments, positions = flat.reshape(4, *shape)
        weights = (segments > 0).astype(np.float32)
        if "weights" in self.columns:
            self._fill_weights(weights, counts, pieces)
        arrays = {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "segments": segments,
            "positions": positions,
            "index": (indices % 2**31).astype(np.int32),
        }
        if "label" in self.columns:
            arrays["labels"] = self._read_labels(counts, pieces, segments)
        return arrays | self._read_source(counts, pieces) if "source" in self.columns else arrays

    def _read_labels(self, counts: np.ndarray, pieces: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """The label of the document of each token, int32 [B, T], 0 on padding; row b has counts[b] of the `pieces`."""
        labels, at = np.zeros(segments.shape, np.int32), 0
        for row, count in enumerate(counts.tolist()):
            own = self.store.labels[self.plan.docs[pieces[at : at + count]]]
            # Segments count the pieces of a row from 1 on.
            labels[row] = np.concatenate([[0], own])[segments[row]]
            at += count
        return labels

    def _fill_weights(self, weights: np.ndarray, counts: np.ndarray, pieces: np.ndarray) -> None:
        """Writes the loss weights from the store into `weights` [B, T]; row b has counts[b] of the `pieces`."""
        plan, at = self.plan, 0
        for row, count in enumerate(counts.tolist()):
            column = 0
            for piece in pieces[at : at + count].tolist():
                # Position i of a piece predicts token i + 1, so its weight is the weight of token i + 1.
                first, length = int(plan.starts[piece]) + 1, int(plan.lengths[piece])
                weights[row, column : column + length] = self.store.weights(
                    int(plan.docs[piece]), first, first + length
                )
                column += length
            at += count

    def _read_source(self, counts: np.ndarray, pieces: np.ndarray) -> Arrays:
        """Reads the fields of the second stream, [B, S] each; row b has counts[b] of the `pieces`."""
        plan, at = self.plan, 0
        tokens, segments, positions = np.zeros((3, len(counts), plan.source_len), np.int32)
        for row, count in enumerate(counts.tolist()):
            column = 0
            for segment, piece in enumerate(pieces[at : at + count].tolist(), 1):
                source = self.store.source(int(plan.docs[piece]))
                columns = slice(column, column + len(source))
                tokens[row, columns] = source
                segments[row, columns] = segment
                positions[row, columns] = np.arange(len(source))
                column += len(source)
            at += count
        return {"source_tokens": tokens, "source_segments": segments, "source_positions": positions}

    def documents(self, indices: np.ndarray) -> list[tuple[str, int, int]]:
        """The tokens that these sequences read, in order, for messages: (plain name of the document, start, stop)."""
        return [(plain_name(self.store.name(doc)), start, stop) for doc, start, stop in self.spans(indices)]

    def spans(self, indices: np.ndarray) -> list[tuple[int, int, int]]:
        """The tokens that these sequences read, in order: (number of the document in the store, start, stop)."""
        _, pieces = self._pieces(np.asarray(indices, np.int64))
        plan = self.plan
        stops = plan.starts[pieces] + plan.lengths[pieces] + 1
        columns = (plan.docs[pieces], plan.starts[pieces], stops)
        return list(zip(*(values.tolist() for values in columns)))

    def _pieces(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds the pieces of the sequences with the numbers `indices` [B].

        Returns the number of pieces in each sequence, int64 [B], and the numbers of all these pieces, int64 [pieces].
        """
        plan = self.plan
        epochs, within = np.divmod(indices, plan.num_rows)
        # Every epoch has a permutation of its own, and a batch may contain sequences of several epochs.
        rows = np.empty_like(indices)
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            rows[here] = permute(within[here], plan.num_rows, self.seed, epoch)
        first = plan.offsets[rows]
        counts = plan.offsets[rows + 1] - first
        if not self.repeat:
            counts[epochs > 0] = 0
        # The pieces of a row count up from its first piece: np.arange counts over all rows, `skipped` shifts each row.
        skipped = first - (np.cumsum(counts) - counts)
        return counts, np.arange(counts.sum()) + np.repeat(skipped, counts)


class Batches(Iterator[Arrays]):
    """An iterator over micro-batches. It must be closed, by `close` or by a `with` statement, to end its thread."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._open = [iterator]
        # A prefetching thread that still runs when the interpreter ends would abort the process. If nobody has closed
        # the iterator, the finalizer does so before the interpreter ends.
        self._finalizer = weakref.finalize(self, _close_all, self._open)

    def __next__(self) -> Arrays:
        if not self._open:
            raise ValueError("These batches are closed.")
        return next(self._open[0])

    def close(self) -> None:
        """Ends the thread. Closing twice is allowed."""
        self._finalizer()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    """Closes the iterators and empties the list."""
    # The references must be gone before the interpreter ends, because grain's destructor fails without its modules.
    while iterators:
        iterators.pop().close()


def make_batches(
    source: PackedSequences,
    *,
    start: int,
    batch_size: int,
    local_rows: np.ndarray | None = None,
    stop: int | None = None,
    prefetch: int = 2,
    length: int = 0,
    layout: RowLayout = AS_PACKED,
) -> Batches:
    """Makes micro-batches of `batch_size` sequences, from sequence number `start` on, as dicts of numpy arrays.

    Args:
      source: the packed sequences.
      start: the data cursor, the number of sequences consumed before.
      batch_size: the sequences of the global micro-batch, over all processes.
      local_rows: int [n], the rows of the global micro-batch that this process needs; None means all.
      stop: the sequence number at which the batches end; None means never. Every micro-batch is full, so ValueError is
        raised if `source` repeats and batch_size does not divide stop - start.
      prefetch: how many micro-batches a background thread makes ahead; 0 means none, and no thread.
      length: the length of the rows into which sequences are cut (`cut_rows`); 0 means that they are not cut.
      layout: which token of a row lies on which of the devices that share the row.
    """
    # Imported late: it takes half a second, in which a run can compile its step, and not all commands read batches.
    import grain
    from grain.experimental import ThreadPrefetchIterDataset

    num_batches = FOREVER if stop is None else -(-(stop - start) // batch_size)
    if stop is not None and source.repeat and (stop - start) % batch_size:
        raise ValueError(f"{stop - start} sequences are no multiple of the batch size {batch_size}.")
    # Every process counts the sequences of the global micro-batch and reads only its own rows of it.
    rows = np.arange(batch_size) if local_rows is None else np.asarray(local_rows)
    length = length or source.plan.seq_len
    read = functools.partial(_read_batch, source, start, batch_size, rows, length, layout)
    dataset = grain.MapDataset.range(num_batches).map(read)
    # grain gets no reading threads: with its default options reading from a memory map is 9 times slower.
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return Batches(iter(ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)))


def _read_batch(
    source: PackedSequences,
    start: int,
    batch_size: int,
    rows: np.ndarray,
    length: int,
    layout: RowLayout,
    number: int,
) -> Arrays:
    """Reads micro-batch `number`, counted from `start`; the other arguments are those of `make_batches`."""
    return lay_out(cut_rows(source.read(start + number * batch_size + rows), length), layout)
