"""Products of bfloat16 matrices for CPUs: computed with float32 results, which are then rounded to bfloat16.

XLA uses the matrix unit of a CPU (AMX) only for products of bfloat16 numbers whose result is float32. On two cores of
an Intel Sapphire Rapids they run at 470 to 580 GFLOP/s, and at 105 where the result is bfloat16. Sums are exact to
float32 either way, so the results differ by their rounding at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def wide_product(x_TX: jax.Array, w_XY: jax.Array) -> jax.Array:
    """x @ w, float32 inside and in the dtype of x outside. Both gradients are computed in the same way."""
    return _rounded("TX,XY->TY", x_TX, w_XY)


def _rounded(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x_TX: jax.Array, w_XY: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return wide_product(x_TX, w_XY), (x_TX, w_XY)


def _backward(saved: tuple[jax.Array, jax.Array], dy_TY: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TX, w_XY = saved
    # XLA multiplies slowly where both operands are contracted over their rows, as in the gradient of w. If the tokens
    # are two dimensions, it makes a transposed copy first, and then uses the matrix unit.
    T = x_TX.shape[0]
    halves = 2 if T % 2 == 0 else 1
    x_2tX, dy_2tY = (x.reshape(halves, T // halves, x.shape[1]) for x in (x_TX, dy_TY))
    return _rounded("TY,XY->TX", dy_TY, w_XY), _rounded("atX,atY->XY", x_2tX, dy_2tY).astype(w_XY.dtype)


wide_product.defvjp(_forward, _backward)
