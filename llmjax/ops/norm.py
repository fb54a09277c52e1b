"""Normalisations over the last dimension: one table that the config and the layer read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Normalization:
    """x / sqrt(mean(x^2) + eps) over the last dimension.

    centred   subtract the mean of x first
    has_bias  the layer may add a learned bias after the normalisation and the scale
    """

    centred: bool = False
    has_bias: bool = False

    def __call__(self, x: jax.Array, eps: float) -> jax.Array:
        """x normalised, in the dtype of x."""
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


NORMS = {
    "rmsnorm": Normalization(),  # Zhang and Sennrich 2019
    "layernorm": Normalization(centred=True, has_bias=True),  # Ba et al. 2016
}
