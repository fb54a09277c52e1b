"""Who sees whom, and which blocks can, against the definition written as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.attention.mask import Mask, Span, cross_mask, self_mask, span_of

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 0, 1, 2, 0, 0]])
KINDS = [(True, 0), (False, 0), (True, 1), (True, 2), (False, 2)]


def by_definition(q_segments, k_segments, q_positions, k_positions, causal, window):
    B, T, S = *q_segments.shape, k_segments.shape[1]
    out = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        back = q_positions[b, t] - k_positions[b, s]
        seen = q_segments[b, t] == k_segments[b, s] != 0
        seen = seen and (back >= 0 or not causal)
        out[b, t, s] = seen and (not window or abs(back) < window)
    return out


@pytest.mark.parametrize("causal, window", KINDS)
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


@pytest.mark.parametrize("causal", [True, False])
def test_padding_sees_nothing_and_is_seen_by_nothing(causal):
    visible = np.asarray(self_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), causal=causal).dense_BTS())
    assert not visible[SEGMENTS == 0].any()
    assert not visible.swapaxes(1, 2)[SEGMENTS == 0].any()


def test_another_sequence_is_seen_whole_segment_by_segment():
    k_segments = np.array([[1, 2, 2, 0, 0], [3, 3, 1, 1, 1]])
    got = cross_mask(jnp.asarray(SEGMENTS), jnp.asarray(k_segments)).dense_BTS()
    expected = (SEGMENTS[:, :, None] == k_segments[:, None]) & (k_segments != 0)[:, None]
    np.testing.assert_array_equal(got, expected)


def test_a_mask_goes_through_jit_with_its_choices_static():
    mask = self_mask(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), causal=False, window=2)
    through = jax.jit(lambda m: m)(mask)
    assert (through.causal, through.window) == (False, 2)
    assert len(jax.tree.leaves(mask)) == 4


def packed(lengths, T):
    segments, positions, at = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32), 0
    for i, n in enumerate(lengths):
        segments[0, at : at + n], positions[0, at : at + n] = i + 1, np.arange(n)
        at += n
    return segments, positions


def block_pairs(segments, positions, size, causal, window):
    """Which blocks may see which, and which do."""
    mask = self_mask(segments, positions, causal=causal, window=window)
    span = span_of(jnp.asarray(segments).reshape(-1, size), jnp.asarray(positions).reshape(-1, size))
    may = mask.may_see(Span(*(x[:, None] for x in span)), Span(*(x[None] for x in span)))
    dense = by_definition(segments, segments, positions, positions, causal, window)[0]
    count = len(dense) // size
    return np.asarray(may), dense.reshape(count, size, count, size).any((1, 3))


@pytest.mark.parametrize("causal, window", [*KINDS, (True, 9), (False, 9), (True, 30)])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_blocks_of_packed_documents_may_see_what_they_do_see(causal, window, size):
    for lengths in ([48], [13, 1, 20], [3, 2, 2, 4, 5, 8, 24], [16, 16, 16]):
        may, do = block_pairs(*packed(lengths, 48), size, causal, window)
        if (
            not window or size == 2
        ):  # the ends of two documents in one block may be out of each other's window
            np.testing.assert_array_equal(may, do)
        assert not (do & ~may).any()
        assert may.sum() <= do.sum() + len(lengths)


@pytest.mark.parametrize("causal, window", KINDS)
def test_no_order_hides_a_block_that_is_seen(causal, window):
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(48)
        segments, positions = (x[:, order] for x in packed([13, 1, 20, 9], 48))
        may, do = block_pairs(segments, positions, 4, causal, window)
        assert not (do & ~may).any()


@pytest.mark.parametrize("causal, window", KINDS)
def test_the_mask_is_the_same_at_the_last_positions_there_are(causal, window):
    """2^31 - 1 is the last position; one more would be the first of all."""
    masks = []
    for start in (0, 2**31 - 1 - POSITIONS.max()):
        positions = jnp.asarray(POSITIONS + start, jnp.int32)
        mask = self_mask(jnp.asarray(SEGMENTS), positions, causal=causal, window=window)
        q, k = (span_of(x.reshape(2, *cut), positions.reshape(2, *cut))
                for x, cut in ((jnp.asarray(SEGMENTS), (4, 1, 2)), (jnp.asarray(SEGMENTS), (1, 4, 2))))  # fmt: skip
        masks.append((mask.dense_BTS(), mask.may_see(q, k), mask.sees_all(q, k)))
    for near, far in zip(*masks, strict=True):
        np.testing.assert_array_equal(near, far)
