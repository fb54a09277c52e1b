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


def plain(x, w, transposed=False):
    return x @ (w.T if transposed else w)


def run(multiply, x, w, dy):
    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(dy)


# Even and odd numbers of tokens take different ways to the gradient of w.
@pytest.mark.parametrize("T", [64, 33])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_and_its_gradients_are_the_exact_ones_rounded_once(T, transposed):
    x_TX, w_XY, dy_TY = inputs(T, jnp.bfloat16)
    arrays = x_TX, w_XY.T if transposed else w_XY, dy_TY
    exact = run(lambda x, w: plain(x, w, transposed), *(np.asarray(x, np.float32) for x in arrays))
    rounded = run(lambda x, w: wide_product(x, w, transposed), *arrays)
    for got, wanted in zip(rounded, exact, strict=True):
        assert got.dtype == jnp.bfloat16 and got.shape == wanted.shape
        # bfloat16 keeps 8 bits. Sums that nearly cancel are exact to float32.
        error = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
        assert (error <= 2.0**-8 * np.abs(wanted) + 1e-5).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_every_product_of_a_bfloat16_model_on_a_cpu_has_a_float32_result(transposed):
    x_TX, w_XY, dy_TY = inputs(64, jnp.bfloat16)
    w = w_XY.T if transposed else w_XY
    x_BTX, dy_BTY = x_TX.reshape(2, 32, -1), dy_TY.reshape(2, 32, -1)

    def multiply(x, w):
        return product(x, w, Layout(), transposed)

    text = str(jax.make_jaxpr(lambda *arrays: run(multiply, *arrays))(x_BTX, w, dy_BTY))
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 3 and all(":f32[" in line for line in dots), text


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_a_float32_model_are_plain(transposed):
    x_TX, w_XY, dy_TY = inputs(64, jnp.float32)
    w = w_XY.T if transposed else w_XY
    got = run(lambda x, w: product(x[None], w, Layout(), transposed)[0], x_TX, w, dy_TY)
    for x, y in zip(got, run(lambda x, w: plain(x, w, transposed), x_TX, w, dy_TY), strict=True):
        np.testing.assert_array_equal(x, y)
