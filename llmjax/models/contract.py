"""What every model family offers: pure functions of parameters and a batch, behind one contract."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax

from llmjax.parallel.rules import Layout
from llmjax.types import Batch, Head, Output, Params

Cache = Any  # what a family keeps of the tokens that it has read: a pytree that nobody else looks into


class Model(Protocol):
    """A language model. `params` is a nested dict of plain arrays; `axes()` names their dimensions."""

    @property
    def layout(self) -> Layout: ...

    @property
    def vocab_size(self) -> int:
        """V, the ids that the head chooses among."""

    @property
    def position_limit(self) -> int:
        """The most tokens of a document that the model has positions for; 0: any number."""

    def init(self, rng: jax.Array) -> Params:
        """Fresh float32 parameters."""

    def axes(self) -> Any:
        """The tree of `init` with a tuple of logical axis names in the place of each array: all that is known of what a
        parameter is, see `parallel/rules.py`."""

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Output:
        """Hidden states, auxiliary loss terms and carry. Deterministic if and only if rng is None."""

    def head(self, params: Params) -> Head:
        """What turns hidden states into logits, ready for the loss: brought together where devices split it."""

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Figures of each layer over all real positions, float32 [L], without dropout, by names of the family's own.

        A GPT gives `residual_rms`, the root mean square of the stream after each layer, and `attention_rms` and
        `mlp_rms` of what its branches add to it. Nothing is computed unless this is called.
        """

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens per row."""

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """logits_BTV of T further tokens per row, and the cache that holds them. Where `valid_BT` is false the token
        is padding and its logits mean nothing."""

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        """What a micro-step costs. `attended`: keys that a token attends to, on average; `tokens_per_device` in rows of
        `seq_len`, of which a device along mesh.seq has its share."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """flops_per_token   floating point operations of a forward and a backward pass, for each token
    activation_bytes  an estimate of what the backward pass keeps on a device
    """

    flops_per_token: float
    activation_bytes: int


def is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def unbox(boxed: Params) -> Params:
    """The arrays out of flax's metadata boxes."""
    return jax.tree.map(lambda b: b.value if is_box(b) else b, boxed, is_leaf=is_box)


def box_axes(boxed: Params) -> Any:
    """The logical axis names out of flax's metadata boxes."""
    return jax.tree.map(lambda b: tuple(b.names), boxed, is_leaf=is_box)
