"""Floating point operations of compiled programs, against products counted by hand."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from llmjax.plan.hlo.flops import product_flops
from llmjax.plan.hlo.parse import loops, parse
from llmjax.plan.topology import topology_devices

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'llmjax[tpu]'"),
]
B, M, K, N = 8, 256, 512, 384
ONE = 2 * M * K * N


def counted(function, device, *dims, trips=None):
    """The operations of `function` of float32 arrays of shape `dims`, and of an integer where `trips` is given."""
    sharding = SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(d, jnp.float32, sharding=sharding) for d in dims]
    if trips is not None:
        args.append(jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding))
    module = parse(jax.jit(function).lower(*args).compile().as_text())
    unknown = {loop.instruction.name: trips for loop in loops(module) if loop.trips is None}
    return product_flops(module, unknown)


def in_a_loop(times):
    def turns(a, b, *n):
        return jax.lax.fori_loop(0, n[0] if n else times, lambda i, x: jnp.tanh(x @ b @ b.T), a)

    return turns


def chained(q, k, v):
    return jnp.einsum("bqk,bkd->bqd", jnp.tanh(jnp.einsum("bqd,bkd->bqk", q, k)), v)


PROGRAMS = [  # (program, shapes, operations)
    (lambda a, b: jnp.tanh(a @ b), ((M, K), (K, N)), ONE),
    (lambda a, b: jnp.sin(a.T) @ jnp.cos(b), ((K, M), (K, N)), ONE),
    (lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b), ((B, M, K), (B, K, N)), B * ONE),
    (lambda a, b: jnp.einsum("bmk,kn->bmn", a, b), ((B, M, K), (K, N)), B * ONE),
    (lambda a, b: jnp.einsum("bmk,bkn->mn", a, b), ((B, M, K), (B, K, N)), B * ONE),
    (chained, ((B, M, K), (B, N, K), (B, N, K)), 2 * B * ONE),
    (in_a_loop(5), ((M, K), (K, N)), 10 * ONE),
    (lambda a, b: a[:, :1] + b[:1], ((M, K), (K, N)), 0),
]


@pytest.mark.parametrize("function, dims, flops", PROGRAMS)
def test_products_count_two_for_each_multiplication(function, dims, flops):
    assert counted(function, jax.devices()[0], *dims) == flops


def test_a_loop_whose_length_depends_on_data_counts_as_it_is_told():
    assert counted(in_a_loop(None), jax.devices()[0], (M, K), (K, N), trips=7) == 14 * ONE


class TestAheadOfTime:
    pytestmark = tpu_aot

    @pytest.mark.parametrize("function, dims, flops", PROGRAMS)
    def test_products_of_a_tpu_count_two_for_each_multiplication(self, function, dims, flops):
        assert counted(function, topology_devices("v5e:2x4")[0], *dims) == flops
