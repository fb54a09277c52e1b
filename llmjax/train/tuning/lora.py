"""LoRA: a frozen matrix W is used as W + scale x A B, and only the two thin matrices A and B train (Hu et al. 2021).

A reads the inputs of W and gives `rank` numbers, from which B makes the outputs. B begins at zero, so that the model
begins as it was. The product is added to W itself and not to what W gives, so that one implementation serves all
families of models, and a layer knows nothing of it. See docs/fine_tuning.md for what that costs.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Annotated

import jax
import jax.numpy as jnp

from llmjax.ranges import COUNT, Range, Unset, check_ranges, check_unread
from llmjax.train.optim.param_roles import Role
from llmjax.train.trees import Path
from llmjax.types import Array

# The names of the two matrices, in the place of the matrix that they adapt.
A, B = "A", "B"
# What the random key of the model is folded with, so that the adapters draw numbers of their own.
OWN_DRAWS = 0x6C6F7261


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The `lora` section of the config.

    rank       the inner size of an adapter; 0 = off
    alpha      the product of A and B is multiplied by alpha / rank
    rslora     multiplies by alpha / sqrt(rank) instead, so that a large rank learns as fast as a small one
               (Kalajdzievski 2023)
    targets    which matrices get an adapter, by their names, see `names.py`; all = every matrix inside the network
    init_from  a folder of adapters as the library peft saves them, to begin with; "" = new ones

    Raises UserError for a value out of range, and for a key that is set while rank is 0.
    """

    rank: Annotated[int, Range(1, COUNT, "off"), Unset(0)]
    alpha: Annotated[float, Range(0, 1e6, above=True), Unset(16.0)]
    rslora: Annotated[bool, Unset(False)]
    targets: Annotated[tuple[str, ...], Unset(("all",))]
    init_from: Annotated[str, Unset("")]

    def __post_init__(self) -> None:
        check_ranges("lora", self)
        if not self.rank:
            check_unread("lora", self, "lora.rank=0", "lora.rank to 8, for example")

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The pair A and B for one matrix, or for each matrix of a stack: of each layer, expert or gate.

    role   what each dimension of the matrix does
    rank   R
    scale  what the product is multiplied by

    With the dimensions [L, D, N, H] of a stack of query matrices, A is [L, D, R] and B is [L, R, N, H].
    """

    role: Role
    rank: int
    scale: float

    @property
    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The logical axes of A and of B: those of the matrix, with one for the rank."""
        names, role = self.role.axes, self.role
        stack, inputs, outputs = (
            tuple(names[i] for i in side) for side in (role.stack, role.inputs, role.outputs)
        )
        return (*stack, *inputs, "rank"), (*stack, "rank_in", *outputs)

    def init(self, rng: Array, path: Path, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """New A, uniform within 1 / sqrt(inputs) as in peft, and B, which is zero, float32, for a matrix of `shape`."""
        stack, inputs, outputs = (
            tuple(shape[i] for i in side) for side in (self.role.stack, self.role.inputs, self.role.outputs)
        )
        rng = jax.random.fold_in(jax.random.fold_in(rng, OWN_DRAWS), zlib.crc32("/".join(path).encode()))
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(rng, (*stack, *inputs, self.rank), jnp.float32, -bound, bound)
        return a, jnp.zeros((*stack, self.rank, *outputs), jnp.float32)

    def product(self, a: Array, b: Array) -> Array:
        """scale x A B, float32, with the dimensions of the matrix."""
        letters, role = "abcdefgh"[: len(self.role.axes)], self.role
        stack, inputs, outputs = (
            "".join(letters[i] for i in side) for side in (role.stack, role.inputs, role.outputs)
        )
        # A TPU would round the factors to bfloat16, and a product so thin is cheap in any precision.
        product = jnp.einsum(
            f"{stack}{inputs}z,{stack}z{outputs}->{letters}", a, b, precision=jax.lax.Precision.HIGHEST
        )
        return self.scale * product
