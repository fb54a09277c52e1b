"""The bias of relative positions: the published buckets, and the same attention and gradients by every algorithm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.attention import blockwise, full, sequence_attention
from llmjax.ops.attention.mask import cross_mask, self_mask
from llmjax.ops.attention.sequence_attention import Sharing, make_attend
from llmjax.ops.position_bias import LinearBias, PositionBias, buckets_of, slopes
from tests.ops.attention.test_blockwise import MASKS, assert_equal, make_inputs, packed

N, R = 4, 8


def bias_of(both_sides, distance=12, seed=7):
    table_RN = jax.random.normal(jax.random.key(seed), (R, N))
    return PositionBias(table_RN, distance, both_sides)


def linear(both_sides):
    return LinearBias(jnp.asarray(slopes(N))[None], 0, both_sides)


@functools.partial(jax.jit, static_argnames=("attend", "softcap", "both_sides", "make"))
def run(attend, inputs, mask, *, softcap=0.0, both_sides=False, make=bias_of):
    """The output, and the gradients of q, k, v, sinks and the table."""
    *arrays, dout = inputs
    bias = make(both_sides)

    def out(q, k, v, sinks, bias):
        return attend(q, k, v, mask, softcap=softcap, sinks_N=sinks, position_bias=bias)

    value, pull = jax.vjp(out, *arrays, bias)
    return value, *pull(dout)


def test_small_distances_have_a_bucket_each_and_large_ones_share():
    assert buckets_of(32, 128)[:20].tolist() == [*range(16), 16, 16, 16, 17]
    assert buckets_of(32, 128)[-1] == 31 and (np.diff(buckets_of(32, 128)) >= 0).all()
    far = jnp.array([[-500, -3, 0, 3, 500]])
    zero = jnp.zeros((1, 5), jnp.int32)
    assert bias_of(False).buckets(zero, far).tolist() == [[7, 3, 0, 0, 0]]
    assert bias_of(True).buckets(zero, far).tolist() == [[3, 2, 0, 6, 7]]


@pytest.mark.interop
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 12), (16, 20), (64, 1000), (4, 3)])
@pytest.mark.parametrize("both_sides", [True, False])
def test_buckets_are_those_of_transformers(buckets, distance, both_sides):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    ahead = np.arange(-2 * distance, 2 * distance)
    theirs = modeling.T5Attention._relative_position_bucket(
        torch.tensor(ahead), both_sides, buckets, distance
    )
    bias = PositionBias(jnp.zeros((buckets, N)), distance, both_sides)
    ours = bias.buckets(jnp.zeros(ahead.shape, jnp.int32), jnp.asarray(ahead))
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_full_attention_adds_the_bias_to_its_scores():
    q, k, v, _, _ = make_inputs(B=1, T=6, S=6)
    segments = jnp.ones((1, 6), jnp.int32)
    # Positions of which no two are neighbours, so that an index would not do.
    positions = jnp.array([[0, 3, 4, 9, 20, 21]])
    mask, bias = self_mask(segments, positions), bias_of(False)
    out = full.attend(q, k, v, mask, position_bias=bias)
    places = np.asarray(positions[0])
    for n, t in np.ndindex(N, 6):
        scores = np.asarray(k[0, : t + 1, n // 2] @ q[0, t, n]) / q.shape[-1] ** 0.5
        scores += [bias.table_RN[buckets_of(R, 12)[min(places[t] - places[s], 12)], n] for s in range(t + 1)]
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[0, t, n], weights @ v[0, : t + 1, n // 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "cross"])
def test_blocks_equal_full_attention_with_gradients_of_the_table(kind):
    make, arrays, settings = MASKS[kind]
    mask, inputs = make(*arrays, **settings), make_inputs(T=arrays[0].shape[1])
    softcap, both_sides = 1.5 * (kind == "window"), "bidirectional" in kind or "both" in kind
    by_blocks = functools.partial(blockwise.attend, block=8)
    got = run(by_blocks, inputs, mask, softcap=softcap, both_sides=both_sides)
    expected = run(full.attend, inputs, mask, softcap=softcap, both_sides=both_sides)
    assert_equal(got, expected)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_slopes_are_those_of_the_paper(heads):
    found = slopes(heads)
    assert found.shape == (heads,) and found.dtype == np.float32
    if heads == 8:
        np.testing.assert_allclose(found, [2.0**-i for i in range(1, 9)])
    if heads == 12:
        # Of 8 heads all, and of 16 heads the first, third, fifth and seventh.
        np.testing.assert_allclose(found[8:], [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5])


@pytest.mark.interop
@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_slopes_are_those_of_transformers(heads):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = modeling.build_alibi_tensor(torch.ones((1, 2)), heads, torch.float32)
    np.testing.assert_allclose(slopes(heads), theirs[:, 0, 1].numpy(), rtol=1e-6)


def test_a_linear_bias_is_minus_the_distance_times_a_number_of_the_head():
    q, k = jnp.array([[5], [9]]), jnp.array([[0, 5, 7]])
    expected = -slopes(N)[:, None, None] * np.array([[5, 0, 2], [9, 4, 2]])
    np.testing.assert_allclose(linear(True).bias(q, k), expected, rtol=1e-6)
    np.testing.assert_allclose(linear(False).part(jnp.int32(1), 2).bias(q, k), expected[1:3], rtol=1e-6)


@pytest.mark.parametrize("algorithm, size", [("gather", 1), ("ulysses", 4)])
@pytest.mark.parametrize("kernel", ["full", "blockwise"])
def test_devices_that_share_a_sequence_equal_one(kernel, algorithm, size):
    from jax.sharding import AxisType, PartitionSpec

    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    inner = make_attend(kernel, Sharing(algorithm, "seq", 4, size))
    tokens, whole = PartitionSpec(None, "seq"), PartitionSpec()
    mask, inputs = self_mask(*packed([[13, 1, 20], [40]], 40), causal=False), make_inputs(K=4)

    def attend(q, k, v, mask, *, softcap, sinks_N, position_bias):
        return jax.shard_map(
            lambda q, k, v, mask, sinks, bias: inner(q, k, v, mask, sinks_N=sinks, position_bias=bias),
            mesh=mesh, in_specs=(tokens, tokens, tokens, whole, whole, whole), out_specs=tokens, check_vma=False,
        )(q, k, v, mask, sinks_N, position_bias)  # fmt: skip

    got = run(attend, inputs, mask, both_sides=True)
    assert_equal(got, run(full.attend, inputs, mask, both_sides=True))
    got = run(attend, inputs, mask, both_sides=True, make=linear)
    assert_equal(got, run(full.attend, inputs, mask, both_sides=True, make=linear))


def test_what_cannot_add_a_bias_does_not_leave_it_out():
    q, k, v, _, _ = make_inputs()
    mask = cross_mask(*(jnp.ones((2, 40), jnp.int32),) * 2)
    for name in sequence_attention.KERNELS:
        if not sequence_attention.adds_bias(name):
            with pytest.raises(ValueError, match="adds no bias"):
                make_attend(name)(q, k, v, mask, position_bias=bias_of(False))
    with pytest.raises(ValueError, match="a ring adds no bias"):
        make_attend("blockwise", Sharing("ring", "seq", 2))(q, k, v, mask, position_bias=bias_of(False))
