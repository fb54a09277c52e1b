"""The contract of a model family: pure functions of parameters and a batch."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax

from llmjax.parallel.rules import Layout
from llmjax.types import Batch, Head, Output, Params

# What a family remembers of the tokens read so far: a pytree that only the family looks into.
Cache = Any


class Model(Protocol):
    """A language model. `params` is a nested dict of arrays, whose dimensions `axes()` names."""

    @property
    def layout(self) -> Layout: ...

    @property
    def vocab_size(self) -> int:
        """V, the number of ids that the head chooses among."""

    @property
    def position_limit(self) -> int:
        """The most tokens of a document that the model has positions for; 0 means any number."""

    def init(self, rng: jax.Array) -> Params:
        """Newly initialised float32 parameters."""

    def axes(self) -> Any:
        """The tree of `init` with a tuple of logical axis names in place of each array, see `parallel/rules.py`.

        These names decide everything about the role of a parameter: its sharding, its optimizer, its clipping.
        """

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Output:
        """Hidden states, auxiliary loss terms and carry. Without `rng` there is no randomness, such as dropout."""

    def head(self, params: Params) -> Head:
        """What turns hidden states into logits, ready for the loss: its matrix is gathered if it is split along D."""

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Statistics of each layer over all real positions, float32 [L] each, without dropout. The family chooses
        their names.

        A GPT returns `residual_rms`, the root mean square of the residual stream after each layer, and
        `attention_rms` and `mlp_rms` of what its two branches add to it. Only a call of this method computes them.
        """

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens per row."""

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """logits_BTV of T further tokens per row, and the cache with these tokens.

        Where `valid_BT` is false, the token is padding and its logits mean nothing.
        """

    def select_rows(self, cache: Cache, rows_B: jax.Array) -> Cache:
        """The cache whose row b is row rows_B[b] of `cache`, for beam search."""

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        """The cost of a micro-step.

        attended           the keys that a token attends to, on average
        tokens_per_device  the tokens of a micro-step divided by the devices that share them
        seq_len            the length of a row
        """


def token_table(params: Params) -> jax.Array:
    """embedding_VD, the embeddings of all tokens, which every family keeps in the same place."""
    table_VD: jax.Array = params["embedding"]["embedding_VD"]
    return table_VD


@runtime_checkable
class ReadsSource(Protocol):
    """What a family has besides that reads a second text, as its `Family.reads_source` says."""

    def encode_source(
        self, params: Params, tokens_BS: jax.Array, segments_BS: jax.Array, positions_BS: jax.Array
    ) -> jax.Array:
        """x_BSD, what the encoder makes of packed sources."""

    def read_source(self, params: Params, tokens_BS: jax.Array, valid_BS: jax.Array, cache: Cache) -> Cache:
        """The cache with the source that each row is written from. Where `valid_BS` is false, there is padding."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a micro-step.

    flops_per_token   floating point operations of a forward and a backward pass, per token
    activation_bytes  an estimate of the bytes per device that the backward pass keeps
    """

    flops_per_token: float
    activation_bytes: int


def is_box(x: Any) -> bool:
    """Whether x is a metadata box of flax."""
    return isinstance(x, nn.LogicallyPartitioned)


def unbox(boxed: Params) -> Params:
    """The arrays inside flax's metadata boxes."""
    return jax.tree.map(lambda b: b.value if is_box(b) else b, boxed, is_leaf=is_box)


def box_axes(boxed: Params) -> Any:
    """The logical axis names in flax's metadata boxes."""
    return jax.tree.map(lambda b: tuple(b.names), boxed, is_leaf=is_box)
