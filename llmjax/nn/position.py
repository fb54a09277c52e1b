"""How a model knows the order of tokens: one table that the config, the model and the rules read.

Positions are int32 and count from 0 in each document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.ops.rope import sinusoid

# (x_BTD, positions_BT, table_TD) -> x_BTD
Add = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Positions:
    """One value of `transformer.position`.

    add      function (x_BTD, positions_BT, table_TD) -> x_BTD that adds positions to embedded tokens
    rotates  whether attention rotates queries and keys by their positions
    table    whether positions are embeddings in a learned table, table_TD; documents cannot be longer than the table
    biases   whether attention adds a learned bias to its scores by the distance of key and query, see
             `ops/position_bias.py`
    even     the size that must be even, head_dim or model_dim; "" for none
    """

    add: Add
    rotates: bool = False
    table: bool = False
    biases: bool = False
    even: str = ""


def _nothing(x_BTD: jax.Array, positions_BT: jax.Array, table_TD: jax.Array | None) -> jax.Array:
    return x_BTD


def _learned(x_BTD: jax.Array, positions_BT: jax.Array, table_TD: jax.Array | None) -> jax.Array:
    # The entry in POSITIONS has table=True, so the caller passes one.
    assert table_TD is not None
    return x_BTD + jnp.take(table_TD, positions_BT, axis=0, mode="clip")


def _sinusoidal(x_BTD: jax.Array, positions_BT: jax.Array, table_TD: jax.Array | None) -> jax.Array:
    D = x_BTD.shape[-1]
    # Embeddings are scaled by sqrt(D), as in Vaswani et al. 2017, section 3.4.
    return x_BTD * D**0.5 + sinusoid(positions_BT, D)


POSITIONS = {
    "rope": Positions(_nothing, rotates=True, even="head_dim"),  # Su et al. 2021
    "learned": Positions(_learned, table=True),  # Gehring et al. 2017
    "sinusoidal": Positions(_sinusoidal, even="model_dim"),  # Vaswani et al. 2017
    "relative": Positions(_nothing, biases=True),  # Raffel et al. 2020 (T5)
}
