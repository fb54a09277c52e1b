"""Scores pieces of text token by token: the common part of all probes.

A probe runs on the host, on both sides of one compiled step. It chooses the texts that the model reads and a label
for each prediction that counts, and it turns the sums per label into results. Losses come back token by token and are
added up in float64, so results depend neither on how pieces are packed into batches nor on the mesh.
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
from llmjax.ops.losses.cross_entropy import Chunking, token_cross_entropy
from llmjax.types import Batch, Params

# The fields of a `Batch`, by name.
Arrays = dict[str, np.ndarray]
# (params, arrays) -> (loss_BT, correct_BT), complete on every process.
TokenLosses = Callable[[Params, Arrays], tuple[Any, Any]]
# The number of predictions in a piece -> the rows and positions of the batch that holds it.
Shape = Callable[[int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A text that the model reads by itself, from position 0 on.

    tokens  int [n + 1]; the model reads tokens[:-1] and predicts tokens[1:]
    labels  int [n], the label that each prediction counts under; -1 means that it does not count
    """

    tokens: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Sums per label, float64 [labels] each: the loss in nats, the number of predictions, and how many greedy
    decoding gets right."""

    loss: np.ndarray
    count: np.ndarray
    correct: np.ndarray

    def at(self, labels: Any) -> Sums:
        """The sums of these labels, in their order."""
        return Sums(self.loss[labels], self.count[labels], self.correct[labels])

    def losses(self) -> list[float | None]:
        """Nats per prediction; None for a label without predictions, or with a loss that is not finite."""
        return ratios(self.loss, self.count)

    def accuracies(self) -> list[float | None]:
        """The share of predictions that greedy decoding gets right."""
        return ratios(self.correct, self.count)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The held-out documents: those with numbers `ids` in the store of `sequences`, which packs them for evaluation."""

    sequences: PackedSequences
    ids: np.ndarray
    tokenizer: Tokenizer

    @property
    def seq_len(self) -> int:
        return self.sequences.plan.seq_len

    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray:
        """The tokens of document `doc` from `start` to before `stop`."""
        return self.sequences.store.tokens(doc, start, stop)

    def lengths(self) -> np.ndarray:
        """int64 [documents], the number of tokens of each held-out document, bos and eos included."""
        return np.asarray(self.sequences.store.lengths[self.ids])


@dataclasses.dataclass(frozen=True)
class Probe:
    """A test of the model on texts that the probe chooses.

    pieces     function that makes the texts; their labels are below `num_labels`
    summarize  function of the sums that returns results in a form that JSON can hold
    """

    pieces: Callable[[], Iterable[Piece]]
    num_labels: int
    summarize: Callable[[Sums], Any]


def ratios(sums: np.ndarray, counts: np.ndarray) -> list[float | None]:
    """sums / counts, in a form that JSON can hold: None if the ratio is not a finite number."""
    values = (float(s) / float(n) if n else math.nan for s, n in zip(sums, counts, strict=True))
    return [value if math.isfinite(value) else None for value in values]


def make_token_losses(
    model: Model,
    *,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
    chunking: Chunking | None = None,
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Returns `token_losses(params, batch) -> (loss_BT, correct_BT)` for every position, whatever its weight.

    See `losses.cross_entropy.token_cross_entropy` for the results and for the other arguments.
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
    # float64, so that the order of the additions does not show in the results.
    sums = np.zeros((3, num_labels))

    def add(labels_BT: np.ndarray, loss_BT: Any, correct_BT: Any) -> None:
        counted_BT = labels_BT >= 0
        labels = labels_BT[counted_BT]
        for row, values_BT in zip(sums, (loss_BT, counted_BT, correct_BT), strict=True):
            values = np.asarray(values_BT)[counted_BT].astype(np.float64)
            row += np.bincount(labels, values, num_labels)

    # The next batch is dispatched before the results of this one are fetched, so that the device always has work.
    under_way: list[tuple] = []
    for arrays, labels_BT in pack(pieces, shape):
        under_way.append((labels_BT, *losses(params, arrays)))
        if len(under_way) > 1:
            add(*under_way.pop(0))
    for dispatched in under_way:
        add(*dispatched)
    return Sums(*sums)


def pack(pieces: Iterable[Piece], shape: Shape) -> Iterator[tuple[Arrays, np.ndarray]]:
    """Packs whole pieces into batches, in their order, one segment each. Yields (the fields of a Batch, labels_BT)."""
    filling: _Filling | None = None
    for piece in pieces:
        if not len(piece.labels):
            continue
        wanted = shape(len(piece.labels))
        # A batch ends when the next piece does not fit or needs a batch of another shape.
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
    """A batch that is filled row by row. The rest is padding."""

    def __init__(self, shape: tuple[int, int]):
        self.arrays: Arrays = empty_arrays({"batch": shape[0], "length": shape[1]})
        self.arrays["index"] += np.arange(shape[0], dtype=np.int32)
        self.labels = np.full(shape, -1, np.int32)
        self._row = self._at = self._segment = 0

    def has_room(self, n: int) -> bool:
        """Whether n more tokens fit, in this row or the next one."""
        rows, length = self.labels.shape
        return self._at + n <= length or self._row + 1 < rows

    def add(self, piece: Piece) -> None:
        """Appends a piece as a new segment."""
        n = len(piece.labels)
        # The piece does not fit into this row: the rest of the row stays padding.
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
