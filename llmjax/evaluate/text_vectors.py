"""Vectors of texts: what a model makes of the tokens of a text, as one vector of the width of the model.

Many texts share a row, and each has the vector that it has by itself. A text is represented by the mean over its tokens
(Reimers and Gurevych 2019), by its last token or by its first one. Texts that are alike have vectors that point the
same way if the model was trained for it; those of a language model are a rough beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError, choose
from llmjax.evaluate.scoring import Arrays, Piece, pack
from llmjax.models.contract import Model, ReadsSource
from llmjax.ops.segments import segment_sums
from llmjax.ranges import Range, Unset, check_ranges
from llmjax.types import Batch, Params

# The values of embed.pool.
POOLS = ("mean", "last", "first")


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """The `embed` section of the config.

    pool        which tokens stand for a text: the mean over all of them, the last one or the first one
    normalize   whether vectors are made of length 1
    read_end    whether the model reads the token that ends a text, too
    neighbours  how many nearest neighbours are shown
    """

    pool: Annotated[str, Unset("mean")]
    normalize: Annotated[bool, Unset(False)]
    read_end: Annotated[bool, Unset(False)]
    neighbours: Annotated[int, Range(1, 2**20), Unset(10)]

    def __post_init__(self) -> None:
        check_ranges("embed", self)
        choose(dict.fromkeys(POOLS), "embed.pool", self.pool)


def make_pooled(
    model: Model, config: EmbedConfig, sees_both_sides: bool
) -> Callable[[Params, Batch], jax.Array]:
    """Returns `pooled(params, batch) -> vectors_BTD`, float32, in which the vector at the last token of each text is
    that of the text. `batch.weights` are 1 at the last token of each text and 0 elsewhere.

    A model that reads a second text, as for translation, gives the vectors that its encoder makes.
    """
    if config.pool == "first" and not sees_both_sides:
        raise UserError(
            "embed.pool='first' reads the first token, which sees no other in a family that sees only what comes "
            "before; use mean or last"
        )

    def states(params: Params, batch: Batch) -> jax.Array:
        if isinstance(model, ReadsSource):
            return model.encode_source(params, batch.tokens, batch.segments, batch.positions)
        output = model.apply(params, batch)
        return output.hidden_BTD if output.states_BTD is None else output.states_BTD

    def pooled(params: Params, batch: Batch) -> jax.Array:
        real_BT = batch.segments > 0
        counted_BT = {
            "mean": real_BT,
            "last": batch.weights != 0,
            "first": real_BT & (batch.positions == 0),
        }[config.pool]
        # Sums over the texts of a row need the whole row.
        states_BTD = model.layout.constrain(states(params, batch).astype(jnp.float32), "batch", None, None)
        # Padding may hold infinities.
        sums_BTD = segment_sums(jnp.where(counted_BT[..., None], states_BTD, 0.0), batch.segments)
        vectors_BTD = sums_BTD / jnp.maximum(segment_sums(counted_BT[..., None], batch.segments), 1.0)
        if not config.normalize:
            return vectors_BTD
        norms_BT1 = jnp.linalg.norm(vectors_BTD, axis=-1, keepdims=True)
        return vectors_BTD / jnp.maximum(norms_BT1, 1e-30)

    return pooled


def text_vectors(
    pooled: Callable[[Arrays], jax.Array], texts: Sequence[Sequence[int]], shape: tuple[int, int]
) -> np.ndarray:
    """float32 [texts, D], the vector of each text.

    pooled  `make_pooled` of the model, called with the fields of a batch, complete on every process
    texts   the ids that the model reads of each text, at least one, and at most as many as a row has
    shape   the rows and the positions of a batch
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for arrays, numbers_BT in pack(_pieces(texts), lambda length: shape):
        at_end = numbers_BT >= 0
        found.append((numbers_BT[at_end], np.asarray(pooled(arrays))[at_end]))
    order = np.argsort(np.concatenate([numbers for numbers, _ in found]))
    vectors: np.ndarray = np.concatenate([vectors for _, vectors in found])[order]
    return vectors


def _pieces(texts: Sequence[Sequence[int]]) -> Iterator[Piece]:
    """Each text as a piece, whose last position has the number of the text as its label."""
    for number, ids in enumerate(texts):
        numbers = np.full(len(ids), -1, np.int32)
        numbers[-1] = number
        # A piece predicts the token after each; nothing looks at the last one here.
        yield Piece(np.array([*ids, 0]), numbers)


def nearest(vector_D: np.ndarray, vectors_ND: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The rows of `vectors_ND` that point most nearly the way of `vector_D`, with the cosine of the angle between.

    At most `count` of them, the nearest first; of equally near ones the first.
    """
    lengths_N = np.linalg.norm(vectors_ND, axis=1) * np.linalg.norm(vector_D)
    cosines_N = vectors_ND @ vector_D / np.maximum(lengths_N, 1e-30)
    order = np.argsort(-cosines_N, kind="stable")[:count]
    return [(int(i), float(cosines_N[i])) for i in order]
