"""Layers with windows of their own: scanned, unrolled and measured alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sections import block_section

from llmjax.models.contract import unbox
from llmjax.nn.block import Block
from llmjax.nn.config import layer_windows, resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.nn.stack import Rotations, init_stack, measure_stack, run_stack
from llmjax.ops.attention import full
from llmjax.ops.attention.mask import self_mask
from llmjax.parallel.rules import Layout

B, T, D, L, WINDOW = 1, 16, 8, 5, 3
CONFIG = resolve(
    block_section(num_layers=L, model_dim=D, num_heads=2, init_std=0.5, window=WINDOW, global_every=2)
)
MASK = self_mask(jnp.ones((B, T), jnp.int32), jnp.arange(T)[None])
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def make_block(compute=LayerCompute(), **changes):  # noqa: B008
    return Block(dataclasses.replace(CONFIG, **changes), Layout(), full.attend, compute)


# Layers that do not rotate queries and keys.
NO_ROTATION = Rotations(None, None)


@functools.cache
def make_params():
    return unbox(init_stack(make_block(), jax.random.key(0), X_BTD, None, MASK))


def by_hand(params, x_BTD, windows):
    for i, window in enumerate(windows):
        layer = jax.tree.map(lambda x, i=i: x[i], params)
        mask = dataclasses.replace(MASK, window=window)
        x_BTD = make_block().apply({"params": layer}, x_BTD, None, mask).x_BTD
    return x_BTD


@functools.partial(jax.jit, static_argnums=0)
def gradients(run, params, x_BTD):
    return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(run(p, x))), (0, 1))(params, x_BTD)


def test_every_nth_layer_is_global():
    assert layer_windows(CONFIG) == (3, 0, 3, 0, 3)
    assert layer_windows(dataclasses.replace(CONFIG, global_every=0)) == (3,) * 5
    assert layer_windows(dataclasses.replace(CONFIG, num_layers=7, global_every=6)) == (3, 3, 3, 3, 3, 0, 3)


@pytest.mark.parametrize("compute", [LayerCompute(), LayerCompute(scan_layers=True, remat="full")], ids=str)
def test_layers_see_as_far_as_their_windows(compute):
    """Five layers in periods of two: the last one is left over."""
    expected = gradients(lambda p, x: by_hand(p, x, (3, 0, 3, 0, 3)), make_params(), X_BTD)
    block = make_block(compute)
    got = gradients(lambda p, x: run_stack(block, p, x, NO_ROTATION, MASK)[0], make_params(), X_BTD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_layers_are_measured_with_their_windows():
    measured = jax.jit(
        lambda p: measure_stack(make_block(), p, X_BTD, NO_ROTATION, MASK, jnp.ones((B, T), bool))
    )
    last = by_hand(make_params(), X_BTD, (3, 0, 3, 0, 3))
    rms = measured(make_params())["residual_rms"]
    assert rms.shape == (L,)
    np.testing.assert_allclose(rms[-1], jnp.sqrt(jnp.mean(jnp.square(last))), rtol=1e-5)


def test_local_layers_alone_reach_no_further_than_their_windows_together():
    block = make_block(LayerCompute(scan_layers=True), global_every=0)
    reach = jax.jit(
        jax.grad(lambda x: jnp.sum(jnp.sin(run_stack(block, make_params(), x, NO_ROTATION, MASK)[0][0, 15])))
    )
    moved = np.abs(reach(X_BTD)[0]).sum(axis=1) > 0
    np.testing.assert_array_equal(moved, np.arange(T) >= 15 - L * (WINDOW - 1))
