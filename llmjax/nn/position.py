"""How a model knows the order of tokens: one table for the choice, the code and the rules.

Positions count from 0 in each document, int32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.ops.rope import sinusoid

Add = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Positions:
    """One value of `model.position`.

    add    (x_BTD, positions_BT, table_TD) -> x_BTD, the embedded tokens with their positions
    turns  queries and keys are turned by their positions
    table  the positions are parameters, table_TD, and there are no others
    even   the size that must be even: head_dim or model_dim; "" for none
    """

    add: Add
    turns: bool = False
    table: bool = False
    even: str = ""


def _nothing(x_BTD: jax.Array, positions_BT: jax.Array, table_TD: jax.Array | None) -> jax.Array:
    return x_BTD


def _learned(x_BTD: jax.Array, positions_BT: jax.Array, table_TD: jax.Array | None) -> jax.Array:
    assert table_TD is not None  # its line in POSITIONS says `table`
    return x_BTD + jnp.take(table_TD, positions_BT, axis=0, mode="clip")


def _sinusoidal(x_BTD: jax.Array, positions_BT: jax.Array, table_TD: jax.Array | None) -> jax.Array:
    D = x_BTD.shape[-1]
    return x_BTD * D**0.5 + sinusoid(positions_BT, D)


POSITIONS = {
    "rope": Positions(_nothing, turns=True, even="head_dim"),  # Su et al. 2021
    "learned": Positions(_learned, table=True),  # Gehring et al. 2017
    "sinusoidal": Positions(_sinusoidal, even="model_dim"),  # Vaswani et al. 2017
}
