"""Models made by hand, whose answers are known: one that copies from its context, and one that never looks at it.

Both speak the model contract as far as probes need it. Hidden states are logits, the output matrix is the identity.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.types import Head, Output

SURE = 30.0  # the logit of what is predicted


@dataclasses.dataclass(frozen=True)
class Copier:
    """Goes on as the text did after the longest earlier match of what was read last; later ones win."""

    vocab_size: int

    def head(self, params):
        return Head(jnp.eye(self.vocab_size))

    def apply(self, params, batch, *, rng=None):
        tokens_BT, segments_BT = batch.tokens, batch.segments
        T = tokens_BT.shape[1]
        same_BTS = (tokens_BT[:, :, None] == tokens_BT[:, None, :]) & (
            segments_BT[:, :, None] == segments_BT[:, None, :]
        )

        def extend(above_BS, same_BS):  # the match that ends in (t, s), of that which ends in (t - 1, s - 1)
            shifted_BS = jnp.pad(above_BS[:, :-1], ((0, 0), (1, 0)))
            matched_BS = jnp.where(same_BS, 1 + shifted_BS, 0)
            return matched_BS, matched_BS

        start_BS = jnp.zeros(tokens_BT.shape, jnp.int32)
        matched_BTS = jnp.moveaxis(jax.lax.scan(extend, start_BS, jnp.moveaxis(same_BTS, 1, 0))[1], 0, 1)
        earlier_TS = jnp.arange(T)[:, None] > jnp.arange(T)[None, :]
        score_BTS = jnp.where(earlier_TS[None], matched_BTS * T + jnp.arange(T)[None, None], -1)
        next_BT = jnp.take_along_axis(tokens_BT, jnp.argmax(score_BTS, axis=2) + 1, axis=1)
        found_BT1 = jnp.max(score_BTS, axis=2, keepdims=True) >= T
        return Output(SURE * jax.nn.one_hot(next_BT, self.vocab_size) * found_BT1)


@dataclasses.dataclass(frozen=True)
class Unigram:
    """Predicts the same whatever it reads; `params` are its logits."""

    vocab_size: int

    def head(self, params):
        return Head(jnp.eye(self.vocab_size))

    def apply(self, params, batch, *, rng=None):
        return Output(jnp.broadcast_to(params, (*batch.tokens.shape, self.vocab_size)))
