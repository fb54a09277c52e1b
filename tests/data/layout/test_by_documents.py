"""The layout `documents` is as even as zigzag for one document and far more even for many documents, with few hops."""

import numpy as np
import pytest

from llmjax.data.layout import by_documents, ring_cost
from llmjax.data.layout.layout import RowLayout
from llmjax.plan.ring_work import ring_work

T, BLOCK = 131072, 512


def work_of_row(name, lengths, shards, seq_len=T, block=BLOCK):
    """The `RingWork` of one row with documents of these lengths, laid out by the layout `name`."""
    lengths = np.asarray(lengths)
    counts = np.append(lengths, seq_len - lengths.sum())
    segments = np.repeat(np.append(np.arange(1, len(counts)), 0), counts)
    positions = np.arange(seq_len) - np.repeat(np.cumsum(counts) - counts, counts)
    order, segment_of = RowLayout(name, shards, block).order(lengths, seq_len)
    return ring_work(segment_of[segments[order]], positions[order], shards, block)


def web_rows(count):
    """Rows of documents as long as those of the web: lognormal lengths, in the order in which they are drawn."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ends = np.minimum(np.cumsum(np.maximum(1, 545 * np.exp(1.1 * rng.standard_normal(2000)))), T)
        lengths = np.diff(ends.astype(int), prepend=0)
        yield lengths[lengths > 0]


@pytest.mark.parametrize("shards", [2, 3, 8, 32])
def test_one_document_has_the_work_of_a_zigzag(shards):
    seq_len = 2 * shards * 512
    zigzag, documents = (
        work_of_row(name, [seq_len], shards, seq_len=seq_len) for name in ("zigzag", "documents")
    )
    np.testing.assert_array_equal(documents.executed, zigzag.executed)


@pytest.mark.parametrize(
    "lengths", [[T // 2, T // 2], [80000, 51072], [80000, 20000, 20000, 11072], [120000]]
)
def test_few_long_documents_are_even(lengths):
    work = work_of_row("documents", lengths, 8)
    assert work.lockstep_slowdown < 1.05 and work.executed_over_needed < 1.01


def test_documents_of_the_web_are_even_on_eight_devices_with_few_hops():
    rows = list(web_rows(24))

    def mean(name):
        works = [work_of_row(name, lengths, 8) for lengths in rows]
        names = ("lockstep_slowdown", "free_running_slowdown", "executed_over_needed", "hops")
        return [np.mean([getattr(work, name) for work in works]) for name in names]

    assert mean("contiguous")[0] > 1.7 and mean("zigzag")[0] > 1.7
    lockstep, free_running, executed, hops = mean("documents")
    assert lockstep < 1.15 and free_running < 1.12 and executed < 1.04 and hops < 3.5


# A shard of 8 has 32 blocks, and a shard of 32 has 8.
@pytest.mark.parametrize("shards, more", [(8, 1.03), (32, 1.2)])
def test_split_documents_fill_their_blocks(shards, more):
    rows = list(web_rows(12))
    whole = sum(work_of_row("contiguous", lengths, 1).executed.sum() for lengths in rows)
    assert sum(work_of_row("documents", lengths, shards).executed.sum() for lengths in rows) < more * whole


def test_short_documents_are_cut_only_where_a_device_is_full():
    # 100 does not divide T, so that some padding is left.
    lengths = np.full(T // 100, 100)
    cuts, _ = by_documents.assign_documents(lengths, T, 8, BLOCK)
    assert len(cuts.document) <= len(lengths) + 7
    assert work_of_row("documents", lengths, 8).hops == 1


def test_padding_is_shared_out_evenly():
    # The documents fill about a third of the row.
    lengths = np.full(60, 800)
    cuts, _ = by_documents.assign_documents(lengths, T, 8, BLOCK)
    tokens = np.bincount(cuts.shard, cuts.stop - cuts.start)
    assert tokens.sum() == 48000 and tokens.max() - tokens.min() <= 2 * BLOCK
    assert work_of_row("documents", lengths, 8).lockstep_slowdown < 1.25


def test_its_time_is_never_much_above_the_time_of_zigzag():
    rng = np.random.default_rng(1)
    rows = [
        np.full(16, T // 16),
        np.full(24, T // 24),
        np.array([T - 12000, *[200] * 60]),
        np.sort(rng.multinomial(T, np.ones(12) / 12)),
        np.array([T // 3] * 3),
    ]
    for lengths in rows:
        for shards in (4, 8):
            time = {}
            for name in ("zigzag", "documents"):
                work = work_of_row(name, lengths, shards)
                time[name] = ring_cost.lockstep_time(ring_cost.steps(work.executed)) * BLOCK**2
                time[name] += by_documents.HOP_COST * T // shards * work.hops
            assert time["documents"] < 1.1 * time["zigzag"], (lengths, shards)


def test_the_estimated_work_is_near_the_work_that_attention_executes():
    for lengths in web_rows(4):
        for shards in (4, 8):
            cuts, _ = by_documents.assign_documents(lengths, T, shards, BLOCK)
            model = by_documents.estimate_work(cuts, shards, T // shards, BLOCK) / BLOCK**2
            executed = work_of_row("documents", lengths, shards).executed
            assert model.sum() == pytest.approx(executed.sum(), rel=0.05)
            model, executed = (ring_cost.lockstep_time(ring_cost.steps(work)) for work in (model, executed))
            assert model == pytest.approx(executed, rel=0.05)
