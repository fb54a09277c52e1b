"""Sampling draws from the distribution it promises, and from nothing outside it."""

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.ops.logits import sample, softcap

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
MANY = jnp.log(jnp.broadcast_to(jnp.asarray(PROBABILITIES, jnp.float32), (20_000, 5)))


def frequencies(**settings):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    ids = sample(jax.random.key(0), MANY, **settings)
    return np.bincount(np.asarray(ids), minlength=5) / len(ids)


def test_plain_sampling_follows_the_softmax():
    np.testing.assert_allclose(frequencies(), PROBABILITIES, atol=0.015)


def test_temperature_sharpens():
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    np.testing.assert_allclose(frequencies(temperature=0.5), expected, atol=0.015)
    assert frequencies(temperature=0.0)[0] == 1.0


def test_top_k_keeps_the_k_most_likely():
    expected = PROBABILITIES * (np.arange(5) < 2) / 0.7
    np.testing.assert_allclose(frequencies(top_k=2), expected, atol=0.015)
    np.testing.assert_allclose(frequencies(top_k=50), PROBABILITIES, atol=0.015)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    np.testing.assert_allclose(frequencies(top_p=0.69), PROBABILITIES * (np.arange(5) < 2) / 0.7, atol=0.015)
    np.testing.assert_allclose(frequencies(top_p=0.75), PROBABILITIES * (np.arange(5) < 3) / 0.9, atol=0.015)
    assert frequencies(top_p=1e-6)[0] == 1.0


def test_softcap_bounds_and_is_the_identity_near_zero():
    x = jnp.array([-100.0, -0.01, 0.0, 0.01, 100.0])
    np.testing.assert_allclose(softcap(x, 5.0), [-5, -0.01, 0, 0.01, 5], rtol=1e-3)
    assert softcap(x, 0.0) is x
