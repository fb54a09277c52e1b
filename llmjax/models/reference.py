"""A model of any family that remembers the parameters with which its run began, to be compared with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from llmjax.models.contract import Cache, Cost, Model
from llmjax.parallel.rules import Layout
from llmjax.types import Batch, Head, Output, Params

# The entry of the tree of parameters that holds the remembered ones, which never train. The others are the model's own.
REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class Referenced:
    """The `Model` contract for a model of another family, here called the base, with a frozen copy of its parameters.

    `base` is the model, which everything is asked of.
    """

    base: Model

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
        return with_reference(self.base.init(rng))

    def axes(self) -> Params:
        return with_reference(self.base.axes())

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Output:
        return self.base.apply(own(params), batch, rng=rng)

    def head(self, params: Params) -> Head:
        return self.base.head(own(params))

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        return self.base.activations(own(params), batch)

    def make_cache(self, batch: int, slots: int) -> Cache:
        return self.base.make_cache(batch, slots)

    def select_rows(self, cache: Cache, rows_B: jax.Array) -> Cache:
        return self.base.select_rows(cache, rows_B)

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        return self.base.decode(own(params), tokens_BT, cache, valid_BT)

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        return self.base.cost(attended, tokens_per_device, seq_len)


def own(params: Mapping) -> Params:
    """The parameters without the remembered ones."""
    return {name: x for name, x in params.items() if name != REFERENCE}


def with_reference(params: Mapping) -> Params:
    """`params`, which are also those to be remembered; what they remembered before is forgotten."""
    params = own(params)
    return {**params, REFERENCE: params}
