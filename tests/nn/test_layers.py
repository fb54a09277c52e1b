"""Norms and the feed-forward layer against their formulas, and what their parameters are called."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sections import block_section

from llmjax.models.contract import box_axes, unbox
from llmjax.nn.config import resolve
from llmjax.nn.layers import MLP, Norm
from llmjax.parallel.rules import Layout, partition_spec

B, T, D, F = 2, 3, 16, 24


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def config(**changes):
    return resolve(block_section(num_layers=4, model_dim=D, num_heads=2, mlp_dim=F, init_std=0.5, **changes))


@pytest.mark.parametrize("kind, use_bias", [("rmsnorm", False), ("layernorm", False), ("layernorm", True)])
def test_a_norm_is_its_formula(kind, use_bias):
    x, eps = normal(0, B, T, D) * 3 + 1, 1e-3
    norm = Norm(kind, eps, use_bias)
    params = {"scale": normal(1, D), "bias": normal(2, D)}
    if not use_bias:
        del params["bias"]
    y, params = np.asarray(x, np.float64), jax.tree.map(np.asarray, params)
    if kind == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * params["scale"] + params.get("bias", 0.0)
    np.testing.assert_allclose(norm.apply({"params": params}, x), y, atol=1e-5)
    fresh = unbox(norm.init(jax.random.key(0), x)["params"])
    assert fresh.keys() == params.keys()
    np.testing.assert_array_equal(fresh["scale"], np.ones(D))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_a_norm_computes_in_float32_and_keeps_the_dtype(kind):
    x = normal(0, B, 4, 512, dtype=jnp.bfloat16) * 100
    y = Norm(kind, 1e-6).apply({"params": {"scale": jnp.ones(512)}}, x)
    assert y.dtype == jnp.bfloat16
    exact = Norm(kind, 1e-6).apply({"params": {"scale": jnp.ones(512)}}, x.astype(jnp.float32))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_the_feed_forward_layer_is_its_formula(activation, use_bias):
    mlp, x = MLP(config(activation=activation, use_bias=use_bias), Layout()), normal(0, B, T, D)
    params = unbox(mlp.init(jax.random.key(0), x)["params"])
    params = {name: normal(i, *array.shape) for i, (name, array) in enumerate(sorted(params.items()))}
    x, given = np.asarray(x), jax.tree.map(np.asarray, params)
    up = x @ given["w_up_DF"] + given.get("up_bias", 0.0)
    if activation == "swiglu":
        gate = x @ given["w_gate_DF"]
        hidden = gate / (1 + np.exp(-gate)) * up
    elif activation == "gelu":
        hidden = up * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (up + 0.044715 * up**3)))
    else:
        hidden = np.maximum(up, 0) ** 2
    expected = hidden @ given["w_down_DF"].T + given.get("down_bias", 0.0)
    np.testing.assert_allclose(mlp.apply({"params": params}, x), expected, rtol=1e-3, atol=1e-3)
    assert ("up_bias" in params) == ("down_bias" in params) == use_bias


def test_every_parameter_is_float32_and_has_a_place_for_each_dimension():
    mlp, x = MLP(config(use_bias=True, dtype="bfloat16"), Layout()), normal(0, B, T, D, dtype=jnp.bfloat16)
    boxed = mlp.init(jax.random.key(0), x)["params"]
    axes, params = box_axes(boxed), unbox(boxed)
    for name, array in params.items():
        assert array.dtype == jnp.float32 and len(axes[name]) == array.ndim
        partition_spec(axes[name])
    assert axes["w_up_DF"] == ("embed", "mlp") and axes["w_down_DF"] == ("residual", "mlp_in")
    assert axes["up_bias"] == ("mlp",)
    assert mlp.apply({"params": params}, x).dtype == jnp.bfloat16


def test_residual_outputs_start_smaller_by_depth():
    wide = dataclasses.replace(config(), model_dim=256, mlp_dim=512)
    params = unbox(MLP(wide, Layout()).init(jax.random.key(0), normal(0, 1, 1, 256))["params"])
    np.testing.assert_allclose(params["w_up_DF"].std(), 0.5, rtol=0.02)
    np.testing.assert_allclose(params["w_gate_DF"].std(), 0.5, rtol=0.02)
    np.testing.assert_allclose(params["w_down_DF"].std(), 0.5 / (2 * 4) ** 0.5, rtol=0.02)
    assert isinstance(MLP(wide, Layout()), nn.Module)
