"""Activation functions of the feed-forward layer: one table that the config, the layer and the FLOP count all read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Activation:
    """The function between the matrix products of a feed-forward layer.

    function  is applied to one array, element by element
    gated     if true, `function` is applied to a separate projection, the gate, and the result multiplies the other
              projection (gated linear unit: Shazeer 2020)
    """

    function: Callable[[jax.Array], jax.Array]
    gated: bool = False

    @property
    def projections(self) -> int:
        """The number of matrix products that read the input: two with a gate, otherwise one. One more writes the
        output."""
        return 2 if self.gated else 1

    def width(self, model_dim: int) -> int:
        """The default width F of the hidden layer, if the config sets none.

        It is 4 D without a gate. With a gate it is 8/3 D, which has the same number of parameters, rounded up to a
        multiple of 64.
        """
        return -(-model_dim * 8 // 3 // 64) * 64 if self.gated else 4 * model_dim


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def _gelu_erf(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {
    "swiglu": Activation(jax.nn.silu, gated=True),  # Shazeer 2020
    "geglu": Activation(jax.nn.gelu, gated=True),  # Shazeer 2020
    # Hendrycks and Gimpel 2016: x times the normal distribution function of x. Their quicker form by tanh (GPT-2)
    # differs from the exact form (BERT) by up to 5e-4.
    "gelu": Activation(jax.nn.gelu),
    "gelu_erf": Activation(_gelu_erf),
    "silu": Activation(jax.nn.silu),  # Elfwing et al. 2017; swish: Ramachandran et al. 2017
    "relu": Activation(jax.nn.relu),  # Vaswani et al. 2017
    "relu2": Activation(_relu2),  # So et al. 2021
}
