"""From a store and a packing plan to batches; the only file that knows grain.

Packed sequence number i is a pure function of (data, seed, i): a row of the plan, in an order that is
shuffled anew each epoch. So the only state is one integer, the number of sequences consumed: it restores in
O(1), is the same on 1, 2 or 64 hosts, and does not care how many sequences a micro-batch or an update takes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Annotated, Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from llmjax.data.layout.layout import Arrays, RowLayout, lay_out
from llmjax.data.packing.packing import PackingPlan, permute
from llmjax.data.packing.shorten_rows import cut_rows
from llmjax.data.sources.reading import BAD_TEXT, ENCODING, MAX_EXPANSION, Reading, check_encoding
from llmjax.errors import UserError
from llmjax.names import plain_name
from llmjax.ranges import Range, Unset, check_ranges

FOREVER = 2**48  # micro-batches; grain wants a length
AS_PACKED = RowLayout()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section of the config.

    sources            what is read: files, directories, globs, or "stdlib"
    text_field         where the text is in JSON lines and Parquet rows
    on_bad_text        what text that is not of the encoding does, and null: "error", "skip" the document, or "replace"
                       the bytes (and skip null)
    encoding           of text and JSON, by any name that Python knows
    follow_links       whether links that lead out of a folder which is searched are followed
    max_expansion      times its own size that a compressed file may unpack to; the first 16 MiB always may
    seq_len            T, positions of a packed sequence
    source_len         S, positions of its second stream, for tasks that have one; 0 = seq_len
    length_points      lengths of the rows into which it is cut, as tokens are seen: `train/steering/length_schedule.py`
    held_out_fraction  of the documents, chosen by hash of their text; 0 = no held-out set
    cache_dir          of tokenizers and token stores; "" = $XDG_CACHE_HOME/llmjax or ~/.cache/llmjax
    num_workers        processes that tokenize; 0 = one per core
    prefetch           micro-batches made ahead of the step by a thread; 0 = none, and no thread
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

    def __post_init__(self):
        check_ranges("data", self)
        _require(self.sources, self, "sources", "must name at least one file, directory or glob")
        _require(self.text_field, self, "text_field", "must name a field of the JSON lines or Parquet rows")
        _require(self.on_bad_text in BAD_TEXT, self, "on_bad_text", f"must be one of {', '.join(BAD_TEXT)}")
        check_encoding(self.encoding)

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading((self.text_field,), self.on_bad_text, self.encoding, self.max_expansion)


def _require(holds: Any, config: DataConfig, key: str, rule: str) -> None:
    if not holds:
        raise UserError(f"data.{key}={getattr(config, key)!r} {rule}")


# The fields of a batch that an optional column of the store fills, see `data/examples/contract.py`.
FIELDS_OF_COLUMN = {
    "weights": (),
    "source": ("source_tokens", "source_segments", "source_positions"),
    "label": (),
}


class PackedSequences:
    """Random access to packed sequences by number; picklable if the store is.

    Args:
      store: has `tokens(doc, start, stop)`, a view of tokens start to stop of a document, and `name(doc)`; and
        `weights(doc, start, stop)` and `source(doc)` where `columns` names them.
      plan: which pieces of which documents make up a row.
      seed: of the order of the rows, which is another one in each epoch.
      columns: which optional columns of the store the batches are made of.
      repeat: whether sequence numbers go on after `plan.num_rows` with the next epoch (training), or give
        rows of padding (evaluation, whose last batch is then padded exactly).
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
        """The sequences numbered `indices` (int [B]), as the fields of a `Batch` [B, T] and [B].

        Positions count from 0 in each piece, also where it continues a document that is longer than T.
        Padding is 0 in all fields. `index` wraps at 2^31.
        """
        indices = np.asarray(indices, np.int64)
        counts, pieces = self._pieces(indices)
        columns = (self.plan.docs[pieces], self.plan.starts[pieces], self.plan.lengths[pieces])
        remaining = zip(*(values.tolist() for values in columns))
        shape = (len(indices), self.plan.seq_len)
        flat = np.zeros((4, shape[0] * shape[1]), np.int32)
        tokens, targets, segments, positions = flat
        count_up = np.arange(shape[1], dtype=np.int32)
        for row, count in enumerate(counts.tolist()):
            at = row * shape[1]
            for segment, (doc, start, length) in enumerate(itertools.islice(remaining, count), 1):
                stop = at + length
                piece = self.store.tokens(doc, start, start + length + 1)
                tokens[at:stop] = piece[:-1]
                targets[at:stop] = piece[1:]
                segments[at:stop] = segment
                positions[at:stop] = count_up[:length]
                at = stop
        tokens, targets, segments, positions = flat.reshape(4, *shape)
        weights = (segments > 0).astype(np.float32)
        if "weights" in self.columns:
            self._weigh(weights, counts, pieces)
        arrays = {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "segments": segments,
            "positions": positions,
            "index": (indices % 2**31).astype(np.int32),
        }
        return arrays | self._source(counts, pieces) if "source" in self.columns else arrays

    def _weigh(self, weights: np.ndarray, counts: np.ndarray, pieces: np.ndarray) -> None:
        """Puts the loss weights of the targets that the store has into `weights` [B, T]."""
        plan, at = self.plan, 0
        for row, count in enumerate(counts.tolist()):
            column = 0
            for piece in pieces[at : at + count].tolist():
                # Position i of a piece predicts token i + 1, whose weight counts.
                first, length = int(plan.starts[piece]) + 1, int(plan.lengths[piece])
                weights[row, column : column + length] = self.store.weights(
                    int(plan.docs[piece]), first, first + length
                )
                column += length
            at += count

    def _source(self, counts: np.ndarray, pieces: np.ndarray) -> Arrays:
        """The fields of the second stream [B, S] for rows of `counts` [B] of the `pieces`."""
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
        """(plain name, start, stop) of the tokens that these sequences read, in order, for messages."""
        return [(plain_name(self.store.name(doc)), start, stop) for doc, start, stop in self.spans(indices)]

    def spans(self, indices: np.ndarray) -> list[tuple[int, int, int]]:
        """(number in the store, start, stop) of the tokens that these sequences read, in order."""
        _, pieces = self._pieces(np.asarray(indices, np.int64))
        plan = self.plan
        stops = plan.starts[pieces] + plan.lengths[pieces] + 1
        columns = (plan.docs[pieces], plan.starts[pieces], stops)
        return list(zip(*(values.tolist() for values in columns)))

    def _pieces(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequence numbers [B] -> how many pieces each has [B], and the numbers of all these pieces."""
        plan = self.plan
        epochs, within = np.divmod(indices, plan.num_rows)
        rows = np.empty_like(indices)
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            rows[here] = permute(within[here], plan.num_rows, self.seed, epoch)
        first = plan.offsets[rows]
        counts = plan.offsets[rows + 1] - first
        if not self.repeat:
            counts[epochs > 0] = 0
        skipped = first - (np.cumsum(counts) - counts)
        return counts, np.arange(counts.sum()) + np.repeat(skipped, counts)


class Batches(Iterator[Arrays]):
    """An iterator over micro-batches that is to be closed, by `close` or `with`.

    A prefetching thread that is still at work when the interpreter goes down aborts the process, so what was
    left open is closed before that, too.
    """

    def __init__(self, iterator: grain.DatasetIterator):
        self._open = [iterator]
        self._finalizer = weakref.finalize(self, _close_all, self._open)

    def __next__(self) -> Arrays:
        if not self._open:
            raise ValueError("These batches are closed.")
        return next(self._open[0])

    def close(self) -> None:
        """Ends the thread; a second time does nothing."""
        self._finalizer()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    """Closes the iterators and lets go of them: grain's destructor fails once its modules are gone."""
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
    """Micro-batches of `batch_size` sequences from sequence number `start` on, as dicts of numpy arrays.

    Args:
      start: the data cursor, the number of sequences consumed before.
      batch_size: sequences of the global micro-batch, over all processes.
      local_rows: int [n], the rows of the global micro-batch that this process needs; None = all.
      stop: where the sequences end; None = never. The last micro-batch is full, so with a source that
        repeats, batch_size must divide stop - start.
      prefetch: micro-batches made ahead in a background thread; 0 = none.
      length: of the rows into which the sequences are cut (`cut_rows`); 0 = whole ones.
      layout: which token of such a row lies on which device of those that share it.
    """
    num_batches = FOREVER if stop is None else -(-(stop - start) // batch_size)
    if stop is not None and source.repeat and (stop - start) % batch_size:
        raise ValueError(f"{stop - start} sequences are no multiple of the batch size {batch_size}.")
    rows = np.arange(batch_size) if local_rows is None else np.asarray(local_rows)
    length = length or source.plan.seq_len
    read = functools.partial(_read_batch, source, start, batch_size, rows, length, layout)
    dataset = grain.MapDataset.range(num_batches).map(read)
    # No threads of its own: with the default options reading from a memory map is 9 times slower.
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
    return lay_out(cut_rows(source.read(start + number * batch_size + rows), length), layout)
