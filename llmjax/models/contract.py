"""What every model family offers: pure functions of parameters and a batch, behind one contract."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import jax

from llmjax.nn.cache import Cache
from llmjax.types import Batch, Params


class Model(Protocol):
    """A language model. `params` is a nested dict of plain arrays; `axes()` names their dimensions."""

    vocab_size: int

    def init(self, rng: jax.Array) -> Params:
        """Fresh float32 parameters."""

    def axes(self) -> Any:
        """The tree of `init` with a tuple of logical axis names in the place of each array."""

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> jax.Array:
        """hidden_BTD, normalised, ready for `unembedding`. Deterministic if and only if rng is None."""

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Root mean squares over all real positions, float32 [L], without dropout: `residual_rms` of the stream after
        each layer, `attention_rms` and `mlp_rms` of what its branches add to it. Made when called, free when not."""

    def unembedding(self, params: Params) -> jax.Array:
        """w_VD; logits_BTV = hidden_BTD @ w_VD.T, soft-capped where the config says so, with w_VD cast to the dtype of
        hidden_BTD, which is left to the reader. Split over devices along V alone."""

    def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
        """float32 logits_BTV."""

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens per row."""

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """logits_BTV of T further tokens per row, and the cache that holds them. Where `valid_BT` is false the token
        is padding and its logits mean nothing."""

    def flops_per_token(self, attended: float) -> float:
        """Floating point operations of a forward and backward pass per token that attends to `attended` keys."""


def is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def unbox(boxed: Params) -> Params:
    """The arrays out of flax's metadata boxes."""
    return jax.tree.map(lambda b: b.value if is_box(b) else b, boxed, is_leaf=is_box)


def box_axes(boxed: Params) -> Any:
    """The logical axis names out of flax's metadata boxes."""
    return jax.tree.map(lambda b: tuple(b.names), boxed, is_leaf=is_box)
