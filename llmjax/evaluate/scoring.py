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
import jax.numpy as jnp
import numpy as np

from llmjax.data.pipeline import PackedSequences
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.models.contract import Model
from llmjax.ops import chunks
from llmjax.ops.logits import softcap
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
    model: Model, *, logit_softcap: float, chunk: int = 512, shards: tuple[int, int] = (1, 1)
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """`token_losses(params, batch) -> (loss_BT, correct_BT)`, of every position, whatever its weight.

    loss_BT is float32, -log p of the target in nats; correct_BT is true where the target is what greedy decoding would
    emit. Logits exist for `chunk` tokens of a shard at a time. `shards`: over how many devices B and T are split.
    """

    def token_losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BTD = model.apply(params, batch)
        w_VD = model.unembedding(params).astype(hidden_BTD.dtype)
        B, T = batch.targets.shape
        X, Y = math.gcd(shards[0], B), math.gcd(shards[1], T)  # Y counts the shards of T, which stay apart
        parts = chunks.cut(T // Y, chunk * X // B)

        def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, Y, C, ...]
            return jnp.moveaxis(parts.split(x.reshape(B, Y, T // Y, *x.shape[2:]), 2), 2, 0)

        def score(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_BYCD, targets_BYC = arrays
            logits_BYCV = softcap(
                jnp.einsum("BYCD,VD->BYCV", hidden_BYCD, w_VD, preferred_element_type=jnp.float32),
                logit_softcap,
            )
            # A sum with one term instead of a lookup: the vocabulary may be split over devices.
            is_target_BYCV = (
                jax.lax.broadcasted_iota(jnp.int32, logits_BYCV.shape, 3) == targets_BYC[..., None]
            )
            target_BYC = jnp.sum(jnp.where(is_target_BYCV, logits_BYCV, 0.0), axis=-1)
            correct_BYC = jnp.argmax(logits_BYCV, axis=-1) == targets_BYC
            return jax.nn.logsumexp(logits_BYCV, axis=-1) - target_BYC, correct_BYC

        outs = jax.lax.map(score, (split(hidden_BTD), split(batch.targets)))
        return tuple(parts.join(jnp.moveaxis(x, 0, 2), 2).reshape(B, T) for x in outs)

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
        self.arrays: Arrays = {
            name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments", "positions")
        }
        self.arrays["weights"] = np.zeros(shape, np.float32)
        self.arrays["index"] = np.arange(shape[0], dtype=np.int32)
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
