"""Sampling draws from the distribution it promises, and from nothing outside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def drawn(logits, temperature=1.0, top_k=0, top_p=1.0, draws=2000):
    """The ids that come up in many draws from one row of logits."""
    logits = jnp.asarray(logits)
    padded = jnp.full(16, -jnp.inf, logits.dtype).at[: len(logits)].set(logits)  # one shape for all tests
    rows = jnp.broadcast_to(padded, (draws, 16))
    ids = sample(jax.random.key(1), rows, temperature=temperature, top_k=top_k, top_p=top_p)
    return set(np.asarray(ids).tolist())


EQUAL = np.zeros(16)
# At the rank of the last that is kept three are equal, as happens in bfloat16.
TIED = np.asarray(jnp.asarray([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], jnp.bfloat16), np.float32)


@pytest.mark.parametrize("logits, settings, expected", [
    (EQUAL, {"top_k": 2}, {0, 1}),
    (EQUAL, {"top_k": 16}, set(range(16))),
    (EQUAL, {"top_p": 0.25}, {0, 1, 2, 3}),
    (EQUAL, {"top_p": 0.26}, {0, 1, 2, 3, 4}),
    (EQUAL, {"top_p": 1e-45}, {0}),
    (EQUAL, {"top_k": 8, "top_p": 0.25}, {0, 1}),
    (EQUAL, {"top_k": 1}, {0}),
    (TIED, {"top_k": 2}, {1, 2}),
    (TIED, {"top_k": 3}, {1, 2, 3}),
    (TIED, {"top_k": 4}, {1, 2, 3, 4}),
    (TIED, {"top_k": 100}, {0, 1, 2, 3, 4, 5}),
    (TIED, {"top_p": 0.5}, {1, 2}),
    (TIED, {"top_k": 3, "top_p": 0.99}, {1, 2, 3}),
    (TIED, {"top_k": 4, "top_p": 0.5}, {1, 2}),
])  # fmt: skip
def test_of_equal_logits_only_the_first_that_are_needed_are_kept(logits, settings, expected):
    for array in (jnp.asarray(logits, jnp.float32), jnp.asarray(logits, jnp.bfloat16)):
        assert drawn(array, **settings) == expected


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-38, 1.2e-38, 1e-40, 1e-45, 5e-324])
def test_the_smallest_temperatures_draw_the_likeliest(temperature):
    for settings in ({}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 4, "top_p": 0.5}):
        assert drawn([5.0, 1.0, 6.0, -3.0, 5.9], temperature, **settings) == {2}
        assert drawn([-1e30, -2e30, -1.1e30], temperature, **settings) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 0.8, 1e4])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.999}, {"top_k": 3, "top_p": 0.9}])
def test_logits_that_are_no_numbers_are_never_drawn(temperature, settings):
    nan, inf = np.nan, np.inf
    assert drawn([nan, 1.0, -inf, 1.0, nan], temperature, **settings) <= {1, 3}
    assert drawn([-inf, -inf, 0.0, nan], temperature, **settings) == {2}
    assert drawn([0.0, inf, 3.0, nan], temperature, **settings) == {1}
    assert len(drawn([nan, -inf, nan], temperature, **settings)) >= 1


def test_a_set_of_likeliest_is_the_smallest_that_reaches_p():
    rng = np.random.default_rng(0)
    for top_k, top_p in ((0, 0.3), (0, 0.8), (5, 0.6), (3, 1.0)):
        logits = np.round(rng.normal(size=12), 0).astype(np.float32)  # many ties
        order = np.argsort(-logits, kind="stable")[: top_k or None]
        p = np.exp(logits[order].astype(np.float64))
        p /= p.sum()
        size = next((n for n in range(1, len(p) + 1) if p[:n].sum() >= top_p - 1e-9), len(p))
        assert drawn(logits, top_k=top_k, top_p=top_p) == set(order[:size].tolist())
