"""Positions as rotations and as sinusoids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.rope import rotate, rotation, sinusoid

B, T, N, H = 2, 7, 3, 8


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def positions(start=0):
    return jnp.broadcast_to(jnp.arange(start, start + T)[None], (B, T))


def test_a_rotation_is_a_complex_product():
    x = np.asarray(normal(0, B, T, N, H))
    theta, i = 100.0, np.arange(H // 2)
    turn = np.exp(1j * np.asarray(positions())[:, :, None, None] * theta ** (-2 * i / H))
    expected = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
    out = np.asarray(rotate(x, *rotation(positions(), H, theta)))
    np.testing.assert_allclose(out[..., : H // 2], expected.real, atol=1e-5)
    np.testing.assert_allclose(out[..., H // 2 :], expected.imag, atol=1e-5)


def test_position_zero_turns_nothing_and_lengths_stay():
    x = normal(1, B, T, N, H)
    y = rotate(x, *rotation(positions(), H, 10000.0))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert not np.allclose(y[:, 1:], x[:, 1:])


def test_a_product_of_query_and_key_depends_on_their_distance_only():
    q, k = normal(2, B, T, N, H), normal(3, B, T, N, H)

    def scores(start):
        turn = rotation(positions(start), H, 10000.0)
        return jnp.einsum("BTNH,BSNH->BNTS", rotate(q, *turn), rotate(k, *turn))

    np.testing.assert_allclose(scores(500), scores(0), atol=1e-4)


def test_low_precision_is_turned_in_float32():
    x = normal(4, B, T, N, H).astype(jnp.bfloat16)
    turn = rotation(positions(100_000), H, 10000.0)
    y = rotate(x, *turn)
    assert y.dtype == jnp.bfloat16 and turn[0].dtype == jnp.float32
    np.testing.assert_array_equal(y, rotate(x.astype(jnp.float32), *turn).astype(jnp.bfloat16))


def test_the_sinusoid_is_that_of_the_paper_with_halves():
    D = 6
    x = sinusoid(positions(3), D)
    p = np.arange(3, 3 + T)[None, :, None]
    angles = p / 10000 ** (2 * np.arange(D // 2) / D)
    np.testing.assert_allclose(x[0], np.concatenate([np.sin(angles), np.cos(angles)], -1)[0], atol=1e-5)
    assert x.shape == (B, T, D) and x.dtype == jnp.float32


@pytest.mark.parametrize("function", [lambda p: rotation(p, H, 1e4), lambda p: sinusoid(p, 4)])
def test_equal_positions_in_different_documents_look_equal(function):
    restarting = jnp.asarray([[0, 1, 2, 0, 1, 2, 3]])
    for array in jax.tree.leaves(function(restarting)):
        np.testing.assert_array_equal(array[:, :3], array[:, 3:6])
