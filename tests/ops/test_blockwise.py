"""Blockwise attention equals attention written out, gradients included, for every mask, grouping, block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.ops.attention import blockwise, full
from llmjax.ops.attention.mask import Mask, self_mask


def make_inputs(B=2, T=40, N=4, K=2, H=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q_BTNH, do_BTNH = (jax.random.normal(k, (B, T, N, H)).astype(dtype) for k in keys[:2])
    k_BSKH, v_BSKH = (jax.random.normal(k, (B, T, K, H)).astype(dtype) for k in keys[2:])
    return q_BTNH, k_BSKH, v_BSKH, do_BTNH


def packed(lengths_B, T):
    """Segments and positions of rows packed with documents of the given lengths; the rest is padding."""
    segments, positions = np.zeros((len(lengths_B), T), np.int32), np.zeros((len(lengths_B), T), np.int32)
    for row, lengths in enumerate(lengths_B):
        at = 0
        for i, n in enumerate(lengths):
            segments[row, at : at + n], positions[row, at : at + n] = i + 1, np.arange(n)
            at += n
    return jnp.asarray(segments), jnp.asarray(positions)


PACKED_40 = packed([[13, 1, 20], [40]], 40)


def out_and_gradients(attend, q, k, v, do, mask):
    @jax.jit
    def run(q, k, v, do, mask):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, *vjp(do)

    return run(q, k, v, do, mask)


def assert_equals_full(inputs, mask, **settings):
    got = out_and_gradients(functools.partial(blockwise.attend, **settings), *inputs, mask)
    wanted = out_and_gradients(full.attend, *inputs, mask)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(1.0, np.max(np.abs(y))))


@pytest.mark.parametrize("block", [2, 8, 16, 40, 128])
def test_packed_causal_segments_equal_full_attention_for_any_block(block):
    assert_equals_full(make_inputs(), self_mask(*PACKED_40), block=block)


@pytest.mark.parametrize("block", [3, 7, 24])
def test_blocks_need_not_divide_the_length(block):
    assert_equals_full(make_inputs(), self_mask(*PACKED_40), block=block)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_and_multi_query_heads_equal_full_attention(kv_heads):
    assert_equals_full(make_inputs(K=kv_heads), self_mask(*PACKED_40), block=8)


@pytest.mark.parametrize("window", [1, 5, 16, 100])
@pytest.mark.parametrize("in_order", [True, False])
def test_sliding_windows_equal_full_attention(window, in_order):
    assert_equals_full(make_inputs(), self_mask(*PACKED_40, window=window, in_order=in_order), block=4)


def test_attention_to_both_sides_skips_nothing():
    assert_equals_full(make_inputs(), self_mask(*PACKED_40, causal=False), block=8)
    assert_equals_full(make_inputs(), self_mask(*PACKED_40, causal=False, window=4), block=8)


def test_shuffled_tokens_are_masked_by_position_when_not_in_order():
    order = jax.random.permutation(jax.random.key(3), 40)
    segments, positions = (x[:, order] for x in PACKED_40)
    q, k, v, do = make_inputs()
    mask = self_mask(segments, positions, in_order=False)
    assert_equals_full((q, k, v, do), mask, block=8)
    shuffled = blockwise.attend(*(x[:, order] for x in (q, k, v)), mask, block=8)
    plain = full.attend(q, k, v, self_mask(*PACKED_40))
    np.testing.assert_allclose(shuffled, plain[:, order], rtol=1e-5, atol=1e-5)


def test_more_keys_than_queries_equal_full_attention():
    q, k, v, do = make_inputs()
    segments, positions = PACKED_40
    mask = Mask(segments[:, 30:37], segments, positions[:, 30:37], positions)
    assert_equals_full((q[:, 30:37], k, v, do[:, 30:37]), mask, block=4)


def test_queries_that_see_nothing_get_zeros_and_no_gradient():
    inputs = make_inputs()
    attend = functools.partial(blockwise.attend, block=8)
    for x in out_and_gradients(attend, *inputs, self_mask(*PACKED_40)):
        assert float(jnp.max(jnp.abs(x[0, 34:]))) == 0.0
        assert bool(jnp.all(jnp.isfinite(x)))


def test_scores_too_large_for_exp_give_exact_weights():
    q, k, v, do = make_inputs()
    q, k = jnp.round(10.0 * q), jnp.round(10.0 * k)  # whole scores of order 300, without rounding
    inputs, mask = (q, k, v, do), self_mask(*PACKED_40)
    got = out_and_gradients(functools.partial(blockwise.attend, scale=1.0, block=8), *inputs, mask)
    wanted = out_and_gradients(functools.partial(full.attend, scale=1.0), *inputs, mask)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * 10.0)  # 10: the order of q and k


def test_another_scale_is_applied_in_both_passes():
    inputs, mask = make_inputs(), self_mask(*PACKED_40)
    got = out_and_gradients(functools.partial(blockwise.attend, scale=0.1, block=8), *inputs, mask)
    wanted = out_and_gradients(functools.partial(full.attend, scale=0.1), *inputs, mask)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_to_float32_as_full_attention_is():
    mask = self_mask(*PACKED_40)
    inputs = make_inputs(dtype=jnp.bfloat16)
    exact = out_and_gradients(full.attend, *(x.astype(jnp.float32) for x in inputs), mask)
    got = out_and_gradients(functools.partial(blockwise.attend, block=8), *inputs, mask)
    for x, y in zip(got, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        largest = float(jnp.max(jnp.abs(y)))
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=2.0**-6 * largest, rtol=0)


def test_rows_and_heads_may_be_sharded():
    mesh = jax.make_mesh((2, 2, 1, 2), ("data", "fsdp", "seq", "tensor"), axis_types=(AxisType.Auto,) * 4)
    segments, positions = packed([[13, 1, 20], [40], [5, 35], [39]], 40)
    inputs, mask = make_inputs(B=4), self_mask(segments, positions)
    wanted = out_and_gradients(full.attend, *inputs, mask)
    rows = ("data", "fsdp")
    sharded = tuple(jax.device_put(x, NamedSharding(mesh, P(rows, None, "tensor", None))) for x in inputs)
    mask = jax.device_put(mask, NamedSharding(mesh, P(rows, None)))
    got = out_and_gradients(functools.partial(blockwise.attend, block=2), *sharded, mask)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_causal_blocks_in_order_cost_little_more_than_half():
    def scores(in_order):  # how many are computed
        q, k, v, _ = make_inputs(B=1, T=256, N=1, K=1, H=48)
        mask = self_mask(*packed([[256]], 256), in_order=in_order)
        text = jax.jit(functools.partial(blockwise.attend, block=32)).lower(q, k, v, mask).as_text()
        outs = [line.split("-> tensor<")[1] for line in text.splitlines() if "dot_general" in line]
        shapes = [[int(n) for n in out.split("xf32")[0].split("x")] for out in outs]
        turns = 8 if "stablehlo.while" in text else 1
        return turns * sum(np.prod(shape) for shape in shapes if shape[-1] != 48)

    assert scores(in_order=True) * 16 == scores(in_order=False) * 9
