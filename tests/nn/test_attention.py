"""Attention laid out over a mesh equals attention on one device, and needs no more than each device's own rows."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sections import block_section, mesh_section

from llmjax.models.contract import unbox
from llmjax.nn.attention import on_each_device
from llmjax.nn.block import Block
from llmjax.nn.config import resolve
from llmjax.ops.attention import full
from llmjax.ops.attention.mask import self_mask
from llmjax.ops.attention.sequence_attention import Sharing, make_attend
from llmjax.parallel.mesh import AXES, make_mesh
from llmjax.parallel.rules import Layout
from llmjax.train.update.fused import MANUAL

B, T, D = 8, 16, 16
CONFIG = resolve(
    block_section(
        num_layers=1,
        model_dim=D,
        num_heads=4,
        num_kv_heads=2,
        init_std=0.5,
        attention_softcap=3.0,
        attention_sinks=True,
    )
)


def make_inputs():
    segments = np.repeat([[1] * 5 + [2] * 9 + [0] * 2, [1] * 16], B // 2, axis=0)
    positions = np.repeat([[*range(5), *range(9), 0, 0], range(16)], B // 2, axis=0)
    x_BTD = np.random.default_rng(0).normal(size=(B, T, D))
    return jnp.asarray(x_BTD, jnp.float32), jnp.asarray(segments), jnp.asarray(positions)


@functools.cache
def make_params():
    x_BTD, segments, positions = make_inputs()
    module = Block(CONFIG, Layout(), full.attend)
    params = unbox(module.init(jax.random.key(0), x_BTD, None, self_mask(segments, positions))["params"])
    params["attention"]["sink_bias"] = jnp.asarray([-1.0, 0.0, 1.0, 2.0])
    return params


def attention(block, x_BTD, mask):
    """The attention of a block, with its projections."""
    return block.attention.output(block.mix_tokens(*block.attention.project(x_BTD, None), mask, block.layout))


def compiled(sizes, kernel="blockwise", algorithm="ring", ulysses=1):
    """The gradients of everything, compiled for a mesh."""
    layout = Layout(make_mesh(mesh_section(*sizes), jax.devices()[: int(np.prod(sizes))]))
    others = tuple(axis for axis in ("data", "fsdp") if layout.axis_size(axis) > 1)
    sharing = Sharing(algorithm, "seq", sizes[2], ulysses, others)
    attend = make_attend(kernel, sharing if sizes[2] > 1 else None)
    module = Block(CONFIG, layout, attend)

    def loss(params, x_BTD, segments, positions):
        mask = self_mask(segments, positions, window=6)
        return jnp.sum(jnp.sin(module.apply({"params": params}, x_BTD, mask, method=attention)))

    rows, whole = layout.sharding("batch", "length"), layout.sharding()
    inputs = layout.sharding("batch", "length", None), rows, rows
    return jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(whole, *inputs))


@pytest.mark.parametrize(
    "sizes, algorithm, ulysses",
    [
        ((1, 1, 1, 1), "ring", 1),
        ((4, 1, 1, 2), "ring", 1),
        ((2, 2, 2, 1), "ring", 1),
        ((1, 1, 8, 1), "ring", 1),
        ((1, 2, 4, 1), "ulysses", 4),
        ((2, 1, 4, 1), "hybrid", 2),
        ((1, 2, 2, 2), "gather", 1),
    ],
)
def test_a_mesh_changes_nothing(sizes, algorithm, ulysses):
    inputs = make_params(), *make_inputs()
    expected = compiled((1, 1, 1, 1), "full")(*inputs)
    got = compiled(sizes, "blockwise", algorithm, ulysses)(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 4, 1, 1)])
def test_no_device_asks_for_the_rows_of_another(sizes):
    program = compiled(sizes).lower(make_params(), *make_inputs()).compile()
    assert not any(name in program.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("manual", [(), *MANUAL.values(), AXES])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), *set(itertools.permutations((8, 1, 1, 1))), (2, 2, 2, 1)])
def test_around_a_kernel_every_axis_of_the_mesh_is_manual(sizes, manual):
    """Whatever part of the mesh the caller has split already: no kernel can be split by the compiler."""
    mesh = make_mesh(mesh_section(*sizes), jax.devices()[: math.prod(sizes)])
    seen = []

    def kernel(q, k, v, mask, *, sinks_N, position_bias=None):
        seen.append(jax.sharding.get_abstract_mesh())
        return q

    def split(q, segments):
        attend = on_each_device(kernel, Layout(mesh, manual))
        return attend(q, q, q, self_mask(segments, segments), sinks_N=None)

    arrays = (jnp.zeros((8, 8, 8, 2)), jnp.zeros((8, 8), jnp.int32))
    if manual:
        split = jax.shard_map(
            split, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names={*manual},
            check_vma=False,
        )  # fmt: skip
    jax.eval_shape(split, *arrays)
    assert [{*found.manual_axes} for found in seen] == [{*AXES}]
