"""Next-token prediction: the loss of a decoder on packed documents, as sums."""

from __future__ import annotations

from collections.abc import Callable

import jax

from llmjax.models.contract import Model
from llmjax.ops.loss import softmax_cross_entropy
from llmjax.types import Batch, LossSums, Params


def make_loss(
    model: Model,
    *,
    logit_softcap: float,
    z_loss: float,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
) -> Callable[..., LossSums]:
    """`loss(params, batch, rng) -> LossSums`; rng None means deterministic.

    metrics: `accuracy`, the summed weight of targets that are the most likely token. z_loss enters training only: with
    rng None the sum is the plain cross-entropy. `shards`, `vocab_shards`: over how many devices B and T, and V, are
    split.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array | None) -> LossSums:
        hidden_BTD = model.apply(params, batch, rng=rng)
        return softmax_cross_entropy(
            hidden_BTD,
            model.unembedding(params),
            batch.targets,
            batch.weights,
            softcap=logit_softcap,
            z_loss=0.0 if rng is None else z_loss,
            shards=shards,
            vocab_shards=vocab_shards,
        )

    return loss
