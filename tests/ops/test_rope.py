"""Positions as rotations and as sinusoids."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.rope import SCALINGS, frequencies, rotate, rotation, sinusoid

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


def test_the_compiler_makes_the_angles_of_all_layers_once():
    def layers(x_LBTNH):
        turn = rotation(positions(), H, 10000.0)
        return sum(jnp.tanh(rotate(x_BTNH, *turn)) for x_BTNH in x_LBTNH)

    program = jax.jit(layers).lower(jnp.ones((4, B, T, N, H))).compile().as_text()
    assert len(re.findall(r"\b(?:sine|cosine)\(", program)) == 1


def test_a_product_of_query_and_key_depends_on_their_distance_only():
    q, k = normal(2, B, T, N, H), normal(3, B, T, N, H)

    def scores(start):
        turn = rotation(positions(start), H, 10000.0)
        return jnp.einsum("BTNH,BSNH->BNTS", rotate(q, *turn), rotate(k, *turn))

    np.testing.assert_allclose(scores(500), scores(0), atol=1e-4)


def plain(H, theta):
    return np.array([theta ** (-2 * i / H) for i in range(H // 2)])


def test_interpolated_positions_are_those_of_shorter_texts():
    scaled, magnitude = frequencies(H, 10000.0, "linear", 4.0)
    np.testing.assert_allclose(scaled * 4.0, plain(H, 10000.0), rtol=1e-12)
    assert magnitude == 1.0


def test_ntk_scaling_keeps_the_highest_frequency_and_interpolates_the_lowest():
    scaled, magnitude = frequencies(64, 10000.0, "ntk", 8.0)
    np.testing.assert_allclose(scaled[[0, -1]], plain(64, 10000.0)[[0, -1]] / [1.0, 8.0], rtol=1e-12)
    np.testing.assert_allclose(scaled, plain(64, 10000.0 * 8.0 ** (64 / 62)), rtol=1e-12)
    assert magnitude == 1.0


def test_yarn_of_llama_2_interpolates_from_pair_20_to_46():
    """Peng et al. 2023: heads of 128, base 10000, 4096 tokens, 16 times as long."""
    scaled, magnitude = frequencies(128, 10000.0, "yarn", 16.0, 4096)
    share = np.array([min(max((i - 20) / 26, 0.0), 1.0) for i in range(64)])
    base = plain(128, 10000.0)
    np.testing.assert_allclose(scaled, (1 - share) * base + share * base / 16.0, rtol=1e-12)
    turns = 4096 * base / (2 * np.pi)  # the paper's r(d) lies at its bounds about there
    assert turns[20] > 32 > turns[21] and turns[45] > 1 > turns[46]
    np.testing.assert_allclose(magnitude, 1.2772588722239781, rtol=1e-12)  # 0.1 ln 16 + 1


def test_llama_3_scaling_goes_by_wavelength():
    """Llama 3.1: base 500000, 8192 tokens, 8 times as long; as its code puts it."""
    scaled, magnitude = frequencies(128, 500_000.0, "llama3", 8.0, 8192)
    expected = []
    for f in plain(128, 500_000.0):
        wavelength = 2 * np.pi / f
        if wavelength < 8192 / 4:
            expected.append(f)
        elif wavelength > 8192:
            expected.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(scaled, expected, rtol=1e-12)
    assert 0 < np.sum((scaled < plain(128, 500_000.0)) & (scaled > plain(128, 500_000.0) / 8)) < 64
    assert magnitude == 1.0


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_factor_of_one_scales_nothing(scaling):
    scaled, magnitude = frequencies(64, 10000.0, scaling, 1.0, 2048)
    np.testing.assert_allclose(scaled, plain(64, 10000.0), rtol=1e-12)
    assert magnitude == 1.0


def test_a_magnitude_stretches_queries_and_keys():
    x = normal(5, B, T, N, H)
    cos, sin = rotation(positions(), H, 10000.0, "yarn", 4.0, 4096)
    stretch = jnp.linalg.norm(rotate(x, cos, sin), axis=-1) / jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(stretch, 0.1 * np.log(4.0) + 1.0, rtol=1e-5)


@pytest.mark.interop
@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_frequencies_are_those_of_transformers(scaling):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers").LlamaConfig
    parameters = {
        "rope_type": scaling,
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = llama(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=65536,
        rope_parameters=parameters,
    )
    expected, magnitude = rope_utils.ROPE_INIT_FUNCTIONS[scaling](config, "cpu")
    got = frequencies(128, 500_000.0, scaling, 8.0, 8192 if scaling != "linear" else 0)
    np.testing.assert_allclose(got[0], expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(got[1], magnitude, rtol=1e-6)


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
