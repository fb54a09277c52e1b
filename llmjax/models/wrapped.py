"""A model of any family with further parameters beside its own, which the task reads: what both have in common."""

from __future__ import annotations

import dataclasses

import jax

from llmjax.models.contract import Cache, Cost, Model
from llmjax.parallel.rules import Layout
from llmjax.types import Batch, Head, Output, Params


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """The `Model` contract, but for `init` and `axes`, by the model of another family, here called the base.

    The base finds its parameters by their names, and does not look at others in the same tree.
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

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Output:
        return self.base.apply(params, batch, rng=rng)

    def head(self, params: Params) -> Head:
        return self.base.head(params)

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
        return self.base.cost(attended, tokens_per_device, seq_len)
