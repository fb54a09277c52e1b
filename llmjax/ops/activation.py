"""Activations of the feed-forward layer: one table for the choice, the code, the parameters, the FLOPs and the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Activation:
    """What lies between the two products of a feed-forward layer.

    function  of one array, element by element
    gated     `function` acts on a projection of its own, the gate, and multiplies the other projection (Shazeer 2020)
    """

    function: Callable[[jax.Array], jax.Array]
    gated: bool = False

    @property
    def projections(self) -> int:
        """Matrix products that read the input: one, or two with a gate. One more writes the output."""
        return 2 if self.gated else 1

    def width(self, model_dim: int) -> int:
        """The width F of the hidden layer where none is given: 4 D, or with a gate 8/3 D, which has as many
        parameters, rounded up to a multiple of 64."""
        return -(-model_dim * 8 // 3 // 64) * 64 if self.gated else 4 * model_dim


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "swiglu": Activation(jax.nn.silu, gated=True),  # Shazeer 2020
    "gelu": Activation(jax.nn.gelu),  # Hendrycks and Gimpel 2016
    "relu2": Activation(_relu2),  # So et al. 2021
}
