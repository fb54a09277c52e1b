"""A model of any family with a head for classes: one more matrix, which turns a hidden state into a logit per class."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.models.contract import Cache, Cost, Model
from llmjax.parallel.rules import Layout
from llmjax.types import Batch, Head, Output, Params

# The entry of the tree of parameters that the head adds. All others are those of the model below.
ENTRY = "classifier"
# What the random key of the model is folded with, so that the head draws numbers of its own.
OWN_DRAWS = 0x636C6173


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The `Model` contract for a model of another family, here called the base, with `class_head` beside its own head.

    base         the model that reads the text
    num_classes  C
    init_std     the standard deviation of the new matrix
    """

    base: Model
    num_classes: int
    init_std: float = 0.02

    @property
    def layout(self) -> Layout:
        return self.base.layout

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def position_limit(self) -> int:
        return self.base.position_limit

    def init(self, rng: jax.Array) -> Params:
        params = self.base.init(rng)
        # The head reads what the output matrix of the base reads.
        D = jax.eval_shape(lambda params: self.base.head(params).w_VD, params).shape[1]
        w_CD = self.init_std * jax.random.normal(jax.random.fold_in(rng, OWN_DRAWS), (self.num_classes, D))
        return {**params, ENTRY: {"w_CD": w_CD, "bias_C": jnp.zeros(self.num_classes)}}

    def axes(self) -> Params:
        return {**self.base.axes(), ENTRY: {"w_CD": ("labels", "embed"), "bias_C": ("labels",)}}

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Output:
        return self.base.apply(params, batch, rng=rng)

    def head(self, params: Params) -> Head:
        return self.base.head(params)

    def class_head(self, params: Params) -> Head:
        """What turns hidden states into logits of the classes."""
        own = params[ENTRY]
        # The axes `fsdp` and `seq` split the matrix along D, and it is small enough to be gathered.
        return Head(self.layout.constrain(own["w_CD"], None, None), own["bias_C"])

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        return self.base.activations(params, batch)

    def make_cache(self, batch: int, slots: int) -> Cache:
        return self.base.make_cache(batch, slots)

    def select_rows(self, cache: Cache, rows_B: jax.Array) -> Cache:
        return self.base.select_rows(cache, rows_B)

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        return self.base.decode(params, tokens_BT, cache, valid_BT)

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        # The head itself is too small to count, but the base counts an output matrix that a classifier does not use.
        return self.base.cost(attended, tokens_per_device, seq_len)
