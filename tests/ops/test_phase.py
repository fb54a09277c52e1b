"""Angles of positions: exact to float32 wherever a token stands, for every frequency that a model can have."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.phase import TWO_PI, cos_sin, phases, turns_of
from llmjax.ops.rope import SCALINGS, frequencies, rotation, sinusoid

LAST = 2**31 - 1
STARTS = (0, 131_072 - 8, 2**20 - 8, 2**22 - 8, 2**24 - 8, 2**30 - 8, LAST - 15)  # of runs of 16 positions
EXACT = 2e-7  # the sine in float32, and half a unit of its angle


def some_positions():
    runs = [np.arange(start, start + 16) for start in STARTS]
    scattered = np.random.default_rng(0).integers(0, 2**31, 2000)
    return np.concatenate([*runs, scattered]).astype(np.int32)


def true_cos_sin(positions, radians):
    angles = positions.astype(np.longdouble)[:, None] * radians.astype(np.longdouble)
    return np.cos(angles), np.sin(angles)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotations_are_exact_at_every_position(scaling, theta):
    length = 8192 if SCALINGS[scaling].reads_length else 0
    positions, settings = some_positions(), (128, theta, scaling, 8.0, length)
    cos, sin = (np.asarray(x)[0, :, 0] for x in rotation(jnp.asarray(positions)[None], *settings))
    radians, magnitude = frequencies(*settings)
    for got, expected in zip((cos, sin), true_cos_sin(positions, radians), strict=True):
        assert np.abs(got - magnitude * expected).max() < EXACT * magnitude


def test_sinusoids_are_exact_at_every_position():
    D, positions = 64, some_positions()
    got = np.asarray(sinusoid(jnp.asarray(positions)[None], D))[0]
    cos, sin = true_cos_sin(positions, 10000.0 ** (-np.arange(D // 2) / (D // 2)))
    assert np.abs(got - np.concatenate([sin, cos], axis=-1)).max() < EXACT


@pytest.mark.parametrize("frequency", [0.0, 1e-12, 1.0, 2.5, 2 * np.pi, 1000.0])
def test_any_frequency_is_a_fraction_of_a_turn(frequency):
    positions = some_positions()
    got = [np.asarray(x)[:, 0] for x in cos_sin(jnp.asarray(positions), np.array([frequency]))]
    fraction = round(Fraction(frequency) / TWO_PI * 2**80)
    turns = 2 * np.pi * np.array([int(p) * fraction % 2**80 / 2**80 for p in positions])
    np.testing.assert_allclose(got, [np.cos(turns), np.sin(turns)], atol=EXACT)


def test_phases_lose_less_than_four_units():
    positions, radians = some_positions(), frequencies(128, 1e4)[0]
    high, low = (words.astype(object) for words in turns_of(radians))
    exact = positions.astype(object)[:, None] * (high * 2**32 + low) % 2**64
    got = np.asarray(phases(jnp.asarray(positions), radians)).astype(object)
    missing = (exact - got * 2**32) % 2**64
    assert (missing < 4 * 2**32).all() and (missing > 0).any()


def test_no_number_of_an_angle_has_64_bits():
    """A device has no float64; and an x64 mode, were it on, must not change what is computed."""
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(lambda p: rotation(p, 64, 1e4))(jnp.zeros((1, 4), jnp.int32))
    widths = {v.aval.dtype.itemsize for e in jaxpr.eqns for v in e.outvars}
    assert max(widths) == 4
