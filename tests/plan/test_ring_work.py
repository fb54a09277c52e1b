"""Counted work, against a dense mask and against the spans that attention itself skips by."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.data.layout.layout import LAYOUTS, RowLayout
from llmjax.ops.attention.mask import Span, self_mask, span_of
from llmjax.plan.ring_work import ring_work

KINDS = [(True, 0), (False, 0), (True, 1), (True, 9), (False, 9)]


def packed(lengths, T):
    counts = [*lengths, T - sum(lengths)]
    segments = np.repeat([*range(1, len(counts)), 0], counts)
    return segments, np.concatenate([np.arange(n) for n in lengths] + [np.zeros(counts[-1])]).astype(int)


def laid_out(lengths, T, layout):
    order, segment_of = layout.order(np.array(lengths), T)
    segments, positions = packed(lengths, T)
    return segment_of[segments[order]], positions[order]


def random_row(rng, T):
    lengths = []
    while sum(lengths) < T - 5:
        lengths.append(int(min(rng.integers(1, 1 + rng.choice([5, 30, 90])), T - sum(lengths))))
    return lengths


def count(pairs, shards):
    """bool [blocks, blocks] -> [n, n]"""
    per = len(pairs) // shards
    return pairs.reshape(shards, per, shards, per).sum(axis=(1, 3))


@pytest.mark.parametrize("causal, window", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_needed_blocks_are_those_of_the_dense_mask_and_executed_those_that_spans_leave(name, causal, window):
    rng, T, shards, block = np.random.default_rng(0), 192, 4, 8
    for _ in range(8):
        segments, positions = laid_out(random_row(rng, T), T, RowLayout(name, shards, block))
        got = ring_work(segments, positions, shards, block, causal=causal, window=window)
        arrays = jnp.asarray(segments, jnp.int32), jnp.asarray(positions, jnp.int32)
        mask = self_mask(*(x[None] for x in arrays), causal=causal, window=window)
        span = span_of(*(x.reshape(-1, block) for x in arrays))
        executed = mask.may_see(Span(*(x[:, None] for x in span)), Span(*(x[None] for x in span)))
        needed = np.asarray(mask.dense_BTS()[0]).reshape(T // block, block, T // block, block).any((1, 3))
        np.testing.assert_array_equal(got.executed, count(np.asarray(executed), shards))
        np.testing.assert_array_equal(got.needed, count(needed, shards))
        assert got.executed.sum() >= got.needed.sum() > 0


def test_a_shard_may_end_within_a_block():
    segments, positions = packed([30, 20], 50)
    got = ring_work(segments, positions, 2, 10)  # 25 tokens a shard: blocks of 10, 10 and 5
    np.testing.assert_array_equal(got.needed, [[6, 0], [3, 6]])
    np.testing.assert_array_equal(got.executed, got.needed)


def test_one_document_in_zigzag_is_in_balance_and_contiguous_is_not():
    zigzag, contiguous, striped = (
        ring_work(*laid_out([1024], 1024, RowLayout(name, 8)), 8, 16)
        for name in ("zigzag", "contiguous", "striped")
    )
    assert zigzag.lockstep_slowdown == pytest.approx(1.0, abs=0.02)
    assert zigzag.hops == zigzag.one_way_hops == contiguous.hops == striped.hops == 7
    assert contiguous.lockstep_slowdown > 1.3 and contiguous.one_way_lockstep_slowdown > 1.7
    assert zigzag.executed.sum() == contiguous.executed.sum()
    assert striped.executed_over_needed == 1.0 and striped.executed.sum() > contiguous.executed.sum()


def test_documents_on_one_device_need_no_hop():
    work = ring_work(*packed([16] * 8, 128), 8, 4)
    assert work.hops == work.one_way_hops == 0
    assert work.lockstep_slowdown == work.free_running_slowdown == 1.0
    np.testing.assert_array_equal(work.executed, 10 * np.eye(8))


def test_spans_that_are_not_tight_cost_blocks_that_are_not_needed():
    segments = np.array(
        [1, 1, 3, 3, 2, 2, 4, 4]
    )  # documents that take turns, each within a block of one device
    work = ring_work(segments, np.tile([0, 1], 4), 2, 4)
    np.testing.assert_array_equal(work.needed, [[1, 0], [0, 1]])
    assert work.executed.sum() == 4 and work.executed_over_needed == 2.0
