"""Products with float32 results equal plain ones, gradients included, and models on a CPU multiply with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.layers import product
from llmjax.ops.wide_product import wide_product
from llmjax.parallel.rules import Layout


def inputs(T, dtype):
    """x_TX, w_XY and the gradient of their product."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((T, 24), (24, 40), (T, 40))]


def run(multiply, x, w, dy):
    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(dy)


# Even and odd numbers of tokens take different ways to the gradient of w.
@pytest.mark.parametrize("T", [64, 33])
def test_a_product_and_its_gradients_are_the_exact_ones_rounded_once(T):
    arrays = inputs(T, jnp.bfloat16)
    exact = run(jnp.matmul, *(np.asarray(x, np.float32) for x in arrays))
    for got, wanted in zip(run(wide_product, *arrays), exact, strict=True):
        assert got.dtype == jnp.bfloat16 and got.shape == wanted.shape
        # bfloat16 keeps 8 bits. Sums that nearly cancel are exact to float32.
        error = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
        assert (error <= 2.0**-8 * np.abs(wanted) + 1e-5).all()


def test_every_product_of_a_bfloat16_model_on_a_cpu_has_a_float32_result():
    x_TX, w_XY, dy_TY = inputs(64, jnp.bfloat16)
    x_BTX, dy_BTY = x_TX.reshape(2, 32, -1), dy_TY.reshape(2, 32, -1)
    text = str(
        jax.make_jaxpr(lambda x, w, dy: run(lambda x, w: product(x, w, Layout()), x, w, dy))(
            x_BTX, w_XY, dy_BTY
        )
    )
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 3 and all(":f32[" in line for line in dots), text
