"""Blockwise attention equals attention written out, gradients included, and touches no block without need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.attention import blockwise, full
from llmjax.ops.attention.mask import Mask, cross_mask, self_mask


def make_inputs(B=2, T=40, S=40, N=4, K=2, H=8, dtype=jnp.float32):
    """q, k, v, sinks, and the gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (N,), (B, T, N, H)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def packed(lengths_B, T):
    """Segments and positions of rows packed with documents of the given lengths; the rest is padding."""
    segments, positions = np.zeros((len(lengths_B), T), np.int32), np.zeros((len(lengths_B), T), np.int32)
    for row, lengths in enumerate(lengths_B):
        at = 0
        for i, n in enumerate(lengths):
            segments[row, at : at + n], positions[row, at : at + n] = i + 1, np.arange(n)
            at += n
    return jnp.asarray(segments), jnp.asarray(positions)


PACKED = packed([[13, 1, 20], [40]], 40)


@functools.partial(jax.jit, static_argnames=("attend", "softcap", "block"))
def run(attend, inputs, mask, *, softcap=0.0, block=None):
    """The output, and the gradients of q, k, v and sinks."""
    q, k, v, sinks, dout = inputs
    attend = functools.partial(attend, softcap=softcap, **({} if block is None else {"block": block}))
    out, pull = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, mask, sinks_N=sinks), q, k, v, sinks)
    return out, *pull(dout)


def without_sinks(inputs):
    return [*inputs[:3], None, inputs[4]]


def assert_equal(got, wanted, error=1e-5):
    """Relative errors, of each array by its norm."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= error * np.linalg.norm(y)


def assert_moves_alone(document, run, inputs):
    """A document of the first row, and everything that `run` makes of it, changes without all the others."""
    q, k, v, sinks, dout = inputs
    changed = [*(x.at[0, document].multiply(-3.0) for x in (q, k, v)), sinks, dout.at[0, document].add(1.0)]
    for x, y in zip(run(changed)[:4], run(inputs)[:4], strict=True):
        np.testing.assert_array_equal(np.delete(x[0], document, 0), np.delete(y[0], document, 0))
        np.testing.assert_array_equal(x[1], y[1])
        assert not np.array_equal(x[0, document], y[0, document])


MASKS = {
    "causal": (self_mask, packed([[40], [40]], 40), {}),
    "bidirectional": (self_mask, packed([[40], [31]], 40), {"causal": False}),
    "packed": (self_mask, PACKED, {}),
    "packed bidirectional": (self_mask, PACKED, {"causal": False}),
    "window": (self_mask, PACKED, {"window": 5}),
    "window to both sides": (self_mask, PACKED, {"causal": False, "window": 5}),
    "cross": (cross_mask, (packed([[20], [9, 3]], 20)[0], packed([[33], [8, 30]], 40)[0]), {}),
}


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_equals_full_attention_for_every_grouping(kind, heads):
    make, arrays, settings = MASKS[kind]
    mask = make(*arrays, **settings)
    inputs = without_sinks(make_inputs(T=arrays[0].shape[1], K=heads))
    assert_equal(run(blockwise.attend, inputs, mask, block=8), run(full.attend, inputs, mask))


@pytest.mark.parametrize("kind", ["packed", "window", "cross"])
def test_soft_cap_and_sinks_equal_full_attention(kind):
    make, arrays, settings = MASKS[kind]
    mask, inputs = make(*arrays, **settings), make_inputs(T=arrays[0].shape[1])
    assert_equal(
        run(blockwise.attend, inputs, mask, softcap=1.5, block=8),
        run(full.attend, inputs, mask, softcap=1.5),
    )


@pytest.mark.parametrize("block", [3, 24, 128])
def test_blocks_need_not_divide_the_length(block):
    inputs, mask = make_inputs(), self_mask(*PACKED)
    assert_equal(run(blockwise.attend, inputs, mask, block=block), run(full.attend, inputs, mask))


def test_tokens_may_lie_in_any_order():
    order = jax.random.permutation(jax.random.key(3), 40)
    mask = self_mask(*(x[:, order] for x in PACKED))
    q, k, v, sinks, dout = make_inputs()
    inputs = [*(x[:, order] for x in (q, k, v)), sinks, dout[:, order]]
    got = run(blockwise.attend, inputs, mask, block=8)
    assert_equal(got, run(full.attend, inputs, mask))
    plain = run(full.attend, (q, k, v, sinks, dout), self_mask(*PACKED))
    assert_equal(got, [*(x[:, order] for x in plain[:4]), plain[4]])


def test_a_part_of_the_queries_equals_that_part_of_all():
    q, k, v, sinks, dout = make_inputs()
    segments, positions = PACKED
    mask = Mask(segments[:, 30:37], segments, positions[:, 30:37], positions)
    inputs = q[:, 30:37], k, v, sinks, dout[:, 30:37]
    assert_equal(run(blockwise.attend, inputs, mask, block=4), run(full.attend, inputs, mask))


def test_queries_that_see_nothing_get_zeros_and_no_gradient():
    mask = self_mask(*PACKED)
    for inputs in (make_inputs(), without_sinks(make_inputs())):
        out, dq, dk, dv, *_ = run(blockwise.attend, inputs, mask, block=8)
        for x in (out, dq, dk, dv):
            assert not np.asarray(x[0, 34:]).any() and np.isfinite(x).all()


def test_scores_too_large_for_exp_give_exact_weights():
    q, k, v, _, dout = make_inputs(H=16)
    inputs = (
        jnp.round(30.0 * q),
        jnp.round(10.0 * k),
        v,
        None,
        dout,
    )  # quarters of order 300, without rounding
    mask = self_mask(*PACKED)
    assert_equal(run(blockwise.attend, inputs, mask, block=8), run(full.attend, inputs, mask))


def test_bfloat16_stays_close_to_float32():
    inputs, mask = without_sinks(make_inputs(dtype=jnp.bfloat16)), self_mask(*PACKED)
    exact = run(full.attend, jax.tree.map(lambda x: x.astype(jnp.float32), inputs), mask)
    got = run(blockwise.attend, inputs, mask, block=8)
    for x, y in zip(got[:4], exact[:4], strict=True):
        assert x.dtype == jnp.bfloat16
        largest = float(jnp.max(jnp.abs(y)))
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=2.0**-6 * largest, rtol=0)


def test_the_backward_pass_keeps_no_more_than_inputs_output_and_log_sums():
    inputs, mask = make_inputs(), self_mask(*PACKED)

    def pull(q, k, v, sinks):
        return jax.vjp(lambda *x: blockwise.attend(*x[:3], mask, sinks_N=x[3], block=8), q, k, v, sinks)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, *inputs[:4]))
    floats = sorted(x.size for x in kept if x.dtype == jnp.float32)
    assert floats == sorted([inputs[0].size, 2 * inputs[1].size, 4, 2 * 40 * 4 * 8, 2 * 40 * 4])


def test_what_no_query_sees_is_never_touched():
    """Weights of 0 times a value that is not a number would show."""
    (q, k, v, _, dout), (segments, positions) = make_inputs(B=1, T=48, S=48), packed([[16, 32]], 48)

    def poisoned(attended, mask, kept):
        """`attended` queries with all keys but `kept` poisoned: output and gradients."""
        hidden = np.setdiff1d(np.arange(48), kept)
        bad = [x.at[:, hidden].set(jnp.nan) for x in (k, v)]
        segments, positions = mask.q_segments_BT[:, attended], mask.q_positions_BT[:, attended]
        mask = dataclasses.replace(mask, q_segments_BT=segments, q_positions_BT=positions)
        inputs = q[:, attended], *bad, None, dout[:, attended]
        out, dq, dk, dv, _ = run(blockwise.attend, inputs, mask, block=8)
        for x in (out, dq, dk, dv):
            assert np.isfinite(x).all()
        assert not np.asarray(dk[:, hidden]).any() and not np.asarray(dv[:, hidden]).any()

    poisoned(np.arange(16, 48), self_mask(segments, positions, causal=False), np.arange(16, 48))  # documents
    poisoned(np.arange(16, 32), self_mask(segments, positions), np.arange(16, 32))  # causality
    poisoned(np.arange(40, 48), self_mask(segments, positions, window=8), np.arange(32, 48))  # window


def test_one_document_does_not_move_with_another():
    mask = self_mask(*PACKED)
    assert_moves_alone(slice(14, 34), lambda x: run(blockwise.attend, x, mask, block=8), make_inputs())


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(T):
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in make_inputs(B=1, T=T, S=T)]
        index = jax.ShapeDtypeStruct((1, T), jnp.int32)
        mask = self_mask(index, index)
        compiled = run.lower(blockwise.attend, inputs, mask, block=128).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(2048), temporaries(8192)
    assert many <= 4.5 * few
    assert many < 8192 * 8192
