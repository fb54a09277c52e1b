"""A model of any family with a head for classes: one more matrix, which turns a hidden state into a logit per class."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.models.wrapped import Wrapped
from llmjax.types import Head, Params

# The entry of the tree of parameters that the head adds. All others are those of the model below.
ENTRY = "classifier"
# What the random key of the model is folded with, so that the head draws numbers of its own.
OWN_DRAWS = 0x636C6173


@dataclasses.dataclass(frozen=True)
class Classifier(Wrapped):
    """The `Model` contract for a model of another family, here called the base, with `class_head` beside its own head.

    The head itself is too small to count as a cost, but the base counts an output matrix that a classifier does not
    use.

    num_classes  C
    init_std     the standard deviation of the new matrix
    """

    num_classes: int
    init_std: float = 0.02

    def init(self, rng: jax.Array) -> Params:
        params = self.base.init(rng)
        # The head reads what the output matrix of the base reads.
        D = jax.eval_shape(lambda params: self.base.head(params).w_VD, params).shape[1]
        w_CD = self.init_std * jax.random.normal(jax.random.fold_in(rng, OWN_DRAWS), (self.num_classes, D))
        return {**params, ENTRY: {"w_CD": w_CD, "bias_C": jnp.zeros(self.num_classes)}}

    def axes(self) -> Params:
        return {**self.base.axes(), ENTRY: {"w_CD": ("labels", "embed"), "bias_C": ("labels",)}}

    def class_head(self, params: Params) -> Head:
        """What turns hidden states into logits of the classes."""
        own = params[ENTRY]
        # The axes `fsdp` and `seq` split the matrix along D, and it is small enough to be gathered.
        return Head(self.layout.constrain(own["w_CD"], None, None), own["bias_C"])
