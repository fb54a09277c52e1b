"""Activations against their definitions, written out with the standard library."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.ops.activation import ACTIVATIONS


def test_the_exact_gelu_is_x_times_the_normal_distribution_with_its_gradient():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    distribution = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    density = np.exp(-(x.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)
    exact, by_tanh = ACTIVATIONS["gelu_erf"].function, ACTIVATIONS["gelu"].function
    np.testing.assert_allclose(exact(x), x * distribution, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(exact(x)))(x)
    np.testing.assert_allclose(gradient, distribution + x * density, rtol=1e-5, atol=1e-6)
    assert 1e-4 < np.abs(exact(x) - by_tanh(x)).max() < 1e-3
