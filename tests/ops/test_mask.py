"""Who sees whom, against the definition written as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.attention.mask import Mask, self_mask

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 0, 1, 2, 0, 0]])


def by_definition(q_segments, k_segments, q_positions, k_positions, causal, window):
    B, T, S = *q_segments.shape, k_segments.shape[1]
    out = np.zeros((B, T, S), bool)
    for b in range(B):
        for t in range(T):
            for s in range(S):
                back = q_positions[b, t] - k_positions[b, s]
                seen = q_segments[b, t] == k_segments[b, s] != 0
                seen = seen and (back >= 0 or not causal)
                out[b, t, s] = seen and (not window or abs(back) < window)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 2])
def test_the_predicate_is_its_definition(causal, window):
    got = self_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), causal=causal, window=window).dense_BTS()
    expected = by_definition(SEGMENTS, SEGMENTS, POSITIONS, POSITIONS, causal, window)
    np.testing.assert_array_equal(got, expected)


def test_it_reads_positions_and_segments_and_never_indices():
    rng = np.random.default_rng(0)
    q, k = rng.permutation(8)[:5], rng.permutation(8)
    parts = (SEGMENTS[:, q], SEGMENTS[:, k], POSITIONS[:, q], POSITIONS[:, k])
    whole = self_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)).dense_BTS()
    moved = Mask(*map(jnp.asarray, parts)).dense_BTS()
    np.testing.assert_array_equal(moved, np.asarray(whole)[:, q][:, :, k])


def test_padding_sees_nothing_and_is_seen_by_nothing():
    visible = np.asarray(self_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), causal=False).dense_BTS())
    assert not visible[SEGMENTS == 0].any()
    assert not visible.swapaxes(1, 2)[SEGMENTS == 0].any()


def test_a_mask_goes_through_jit_with_its_choices_static():
    mask = self_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), causal=False, window=2, in_order=False)
    through = jax.jit(lambda m: m)(mask)
    assert (through.causal, through.window, through.in_order) == (False, 2, False)
    assert len(jax.tree.leaves(mask)) == 4
