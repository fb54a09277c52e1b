"""What every probe is made of: pieces of text, each prediction of which counts under a label, and how they are scored.

A probe is host-side arithmetic on both sides of one compiled step: it says which texts the model reads and where it is
looked at, and makes its figures of the sums that come back. Losses come back token by token and are added up in
float64, so the figures depend neither on how pieces were packed into batches nor on the mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from llmjax.batch import empty_arrays
from llmjax.data.pipeline import PackedSequences
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.models.contract import Model
from llmjax.ops.loss import Chunking, token_cross_entropy
from llmjax.types import Batch, Params

Arrays = dict[str, np.ndarray]  # the fields of `Batch`
TokenLosses = Callable[[Params, Arrays], tuple[Any, Any]]  # loss_BT, correct_BT, whole on every process
Shape = Callable[
    [int], tuple[int, int]
]  # predictions of a piece -> rows and positions of the batch that takes it


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A text that the model reads by itself, from position 0 on.

    tokens  int [n + 1]; the model reads tokens[:-1] and is to predict tokens[1:]
    labels  int [n], what each prediction counts under; -1: nothing
    """

    tokens: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """float64 [labels]: the summed loss in nats, the predictions, and how many of them greedy decoding gets right."""

    loss: np.ndarray
    count: np.ndarray
    correct: np.ndarray

    def at(self, labels: Any) -> Sums:
        """The sums of some labels, in their order."""
        return Sums(self.loss[labels], self.count[labels], self.correct[labels])

    def losses(self) -> list[float | None]:
        """Nats per prediction; None where there was none, or no finite number."""
        return ratios(self.loss, self.count)

    def accuracies(self) -> list[float | None]:
        """The share of predictions that greedy decoding gets right."""
        return ratios(self.correct, self.count)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The held-out documents: `ids` in the store of `sequences`, which are the documents as evaluation packs them."""

    sequences: PackedSequences
    ids: np.ndarray
    tokenizer: Tokenizer

    @property
    def seq_len(self) -> int:
        return self.sequences.plan.seq_len

    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray:
        return self.sequences.store.tokens(doc, start, stop)

    def lengths(self) -> np.ndarray:
        """int64 [documents], tokens of each document of `ids`, bos and eos included."""
        return np.asarray(self.sequences.store.lengths[self.ids])


@dataclasses.dataclass(frozen=True)
class Probe:
    """`pieces()`, the texts; their labels are below `num_labels`; `summarize(sums)`, figures that JSON can hold."""

    pieces: Callable[[], Iterable[Piece]]
    num_labels: int
    summarize: Callable[[Sums], Any]


def ratios(sums: np.ndarray, counts: np.ndarray) -> list[float | None]:
    """sums / counts as JSON holds them: None for what is no number."""
    values = (float(s) / float(n) if n else math.nan for s, n in zip(sums, counts, strict=True))
    return [value if math.isfinite(value) else None for value in values]


def make_token_losses(
    model: Model,
    *,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
    chunking: Chunking | None = None,
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """`token_losses(params, batch) -> (loss_BT, correct_BT)`, of every position, whatever its weight.

    What they are is said by `ops.loss.token_cross_entropy`, and `shards`, `vocab_shards` and `chunking` as well.
    """

    def token_losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return token_cross_entropy(
            model.apply(params, batch).hidden_BTD,
            model.head(params),
            batch.targets,
            shards=shards,
            vocab_shards=vocab_shards,
            chunking=chunking,
        )

    return token_losses


def score_pieces(
    losses: TokenLosses, params: Params, pieces: Iterable[Piece], num_labels: int, shape: Shape
) -> Sums:
    """The sums over all pieces, by label."""
    sums = np.zeros((3, num_labels))

    def add(labels_BT: np.ndarray, loss_BT: Any, correct_BT: Any) -> None:
        counted_BT = labels_BT >= 0
        labels = labels_BT[counted_BT]
        for row, values_BT in zip(sums, (loss_BT, counted_BT, correct_BT), strict=True):
            values = np.asarray(values_BT)[counted_BT].astype(np.float64)
            row += np.bincount(labels, values, num_labels)

    under_way: list[tuple] = []  # a batch is fetched when the next one has been dispatched
    for arrays, labels_BT in pack(pieces, shape):
        under_way.append((labels_BT, *losses(params, arrays)))
        if len(under_way) > 1:
            add(*under_way.pop(0))
    for dispatched in under_way:
        add(*dispatched)
    return Sums(*sums)


def pack(pieces: Iterable[Piece], shape: Shape) -> Iterator[tuple[Arrays, np.ndarray]]:
    """(the fields of a Batch, labels_BT), filled with whole pieces in their order, a segment each, and padded."""
    filling: _Filling | None = None
    for piece in pieces:
        if not len(piece.labels):
            continue
        wanted = shape(len(piece.labels))
        if filling is not None and (
            filling.labels.shape != wanted or not filling.has_room(len(piece.labels))
        ):
            yield filling.arrays, filling.labels
            filling = None
        if filling is None:
            filling = _Filling(wanted)
        filling.add(piece)
    if filling is not None:
        yield filling.arrays, filling.labels


class _Filling:
    """A batch that is being filled row by row."""

    def __init__(self, shape: tuple[int, int]):
        self.arrays: Arrays = empty_arrays({"batch": shape[0], "length": shape[1]})
        self.arrays["index"] += np.arange(shape[0], dtype=np.int32)
        self.labels = np.full(shape, -1, np.int32)
        self._row = self._at = self._segment = 0

    def has_room(self, n: int) -> bool:
        rows, length = self.labels.shape
        return self._at + n <= length or self._row + 1 < rows

    def add(self, piece: Piece) -> None:
        n = len(piece.labels)
        if self._at + n > self.labels.shape[1]:
            self._row, self._at, self._segment = self._row + 1, 0, 0
        self._segment += 1
        here = self._row, slice(self._at, self._at + n)
        self.arrays["tokens"][here] = piece.tokens[:-1]
        self.arrays["targets"][here] = piece.tokens[1:]
        self.arrays["segments"][here] = self._segment
        self.arrays["positions"][here] = np.arange(n)
        self.arrays["weights"][here] = piece.labels >= 0
        self.labels[here] = piece.labels
        self._at += n
