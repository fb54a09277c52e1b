"""The reference attention against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.attention.full import attend
from llmjax.ops.attention.mask import Mask, cross_mask, self_mask

B, T, N, K, H = 2, 8, 4, 2, 6
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 0, 0]])
POSITIONS = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 0, 1, 2, 0, 0]])


def arrays(seed=0, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(scale * rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K)]


def reference(q, k, v, visible, softcap=0.0, sinks=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(visible[b, t])
        if len(seen):
            scores = k[b, seen, n // (N // K)] @ q[b, t, n] / H**0.5
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores)
            total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[n]))
            out[b, t, n] = weights / total @ v[b, seen, n // (N // K)]
    return out


@pytest.mark.parametrize("causal, window", [(True, 0), (False, 0), (True, 2), (False, 2)])
def test_it_is_softmax_attention_with_grouped_queries(causal, window):
    q, k, v = arrays()
    mask = self_mask(SEGMENTS, POSITIONS, causal=causal, window=window)
    expected = reference(q, k, v, np.asarray(mask.dense_BTS()))
    np.testing.assert_allclose(attend(q, k, v, mask), expected, atol=1e-5)


def test_scores_are_capped_and_sinks_take_their_share():
    q, k, v = arrays(scale=2.0)
    mask, sinks = self_mask(SEGMENTS, POSITIONS), np.array([-1.0, 0.0, 1.0, 3.0])
    expected = reference(q, k, v, np.asarray(mask.dense_BTS()), softcap=1.5, sinks=sinks)
    out = attend(q, k, v, mask, softcap=1.5, sinks_N=jnp.asarray(sinks, jnp.float32))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_queries_see_all_of_another_sequence_but_its_padding():
    q, k, v = arrays()
    q_segments, k_segments = jnp.asarray([[1, 1, 1, 1, 0], [1, 1, 2, 2, 2]]), SEGMENTS.clip(0, 2)
    visible = np.asarray(q_segments)[:, :, None] == np.where(k_segments == 0, -1, k_segments)[:, None]
    out = attend(q[:, :5], k, v, cross_mask(q_segments, k_segments))
    np.testing.assert_allclose(out, reference(q[:, :5], k, v, visible), atol=1e-5)


def test_a_token_may_be_asked_about_the_keys_before_it():
    q, k, v = arrays()
    last = Mask(SEGMENTS[:, 5:7], SEGMENTS, POSITIONS[:, 5:7], POSITIONS)
    whole = attend(q, k, v, self_mask(SEGMENTS, POSITIONS))
    np.testing.assert_allclose(attend(q[:, 5:7], k, v, last), whole[:, 5:7], atol=1e-6)


@pytest.mark.parametrize("sinks", [None, jnp.zeros(N)])
def test_padding_gives_zeros_and_gradients_without_nan(sinks):
    q, k, v = arrays(1)
    mask = self_mask(SEGMENTS, POSITIONS)
    out, pull = jax.vjp(lambda *x: attend(*x, mask, sinks_N=sinks), q, k, v)
    assert not np.asarray(out)[np.asarray(SEGMENTS) == 0].any()
    for gradient in pull(jnp.ones_like(out)):
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[np.asarray(SEGMENTS) == 0].any()


def test_one_document_does_not_move_with_another():
    q, k, v = arrays(2)
    mask = self_mask(SEGMENTS, POSITIONS)
    out = attend(q, k, v, mask)
    changed = [x.at[:, 3:].add(1.0) for x in (q, k, v)]
    np.testing.assert_array_equal(attend(*changed, mask)[:1, :3], out[:1, :3])


def test_the_softmax_is_float32_in_low_precision():
    q, k, v = arrays(3, jnp.bfloat16, scale=3.0)
    mask = self_mask(SEGMENTS, POSITIONS)
    out = attend(q, k, v, mask)
    assert out.dtype == jnp.bfloat16
    expected = reference(q, k, v, np.asarray(mask.dense_BTS()))
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.05)


def test_large_scores_do_not_overflow():
    q, k, v = arrays(4, scale=1e4)
    assert np.isfinite(attend(q, k, v, self_mask(SEGMENTS, POSITIONS))).all()
