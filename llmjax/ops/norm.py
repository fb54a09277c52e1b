"""Normalisations of the last dimension: one table for the choice, the code and the parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Normalization:
    """x / sqrt(mean(x^2) + eps) over the last dimension.

    centred   the mean is taken off before
    has_bias  a bias may be added in the end
    """

    centred: bool = False
    has_bias: bool = False

    def __call__(self, x: jax.Array, eps: float) -> jax.Array:
        """x normalised, in its own dtype."""
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


NORMS = {
    "rmsnorm": Normalization(),  # Zhang and Sennrich 2019
    "layernorm": Normalization(centred=True, has_bias=True),  # Ba et al. 2016
}
