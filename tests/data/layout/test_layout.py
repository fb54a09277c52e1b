"""A layout is an order of the columns of a row: it loses no token, and the tokens ascend within each shard."""

import numpy as np
import pytest

from llmjax.data.layout.layout import LAYOUTS, RowLayout, lay_out
from llmjax.errors import UserError
from llmjax.parallel import mesh


def random_rows(rng, seq_len, shards, count):
    """The lengths of the documents in rows of many kinds: one document, two, many, single tokens; full or half full."""
    for number in range(count):
        lengths = [
            np.array([seq_len]),
            np.array([seq_len // 2, seq_len - seq_len // 2]),
            np.maximum(1, rng.lognormal(np.log(1 + seq_len / 60), 1.5, 200).astype(int)),
            np.full(200, 1 + int(seq_len * rng.random())),
            np.maximum(1, (seq_len / shards * rng.uniform(0.3, 1.7, 64)).astype(int)),
            np.ones(seq_len, int),
            rng.integers(1, seq_len + 1, 30),
        ][number % 7]
        lengths = lengths[np.cumsum(lengths) <= seq_len]
        if number % 3 == 1:
            lengths = lengths[: len(lengths) // 2]
        elif number % 3 == 2 and lengths.sum() < seq_len:
            lengths = np.append(lengths, seq_len - lengths.sum())
        yield lengths


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6, 7, 8, 32])
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_order_holds_every_column_once_and_ascends_within_each_shard(name, shards):
    rng = np.random.default_rng(shards)
    for part in (1, 5, 24, 100):
        seq_len = 2 * shards * part
        for lengths in random_rows(rng, seq_len, shards, 21):
            layout = RowLayout(name, shards, block=int(rng.choice([1, 8, 64])))
            order, segment_of = layout.order(lengths, seq_len)
            assert np.array_equal(np.sort(order), np.arange(seq_len))
            assert segment_of[0] == 0 and np.array_equal(np.sort(segment_of), np.arange(len(lengths) + 1))
            padding = seq_len - lengths.sum()
            segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
            # One number for each token, by which (segment, position) is compared.
            places = segment_of[segments[order]].astype(np.int64) * seq_len + order
            # Padding comes last in each shard.
            places[segments[order] == 0] = 2**60
            assert (np.diff(places.reshape(shards, -1), axis=1) >= 0).all()


def test_layouts_that_ignore_documents_follow_their_definitions():
    def columns(name):
        order, segment_of = RowLayout(name, 4).order(np.array([3, 9]), 16)
        assert segment_of.tolist() == [0, 1, 2]
        return order.reshape(4, 4).tolist()

    assert columns("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert columns("zigzag") == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert columns("striped") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


def test_an_order_is_a_function_of_the_lengths_alone():
    lengths = np.array([700, 30, 500, 90, 200])
    first = RowLayout("documents", 4, 32).order(lengths, 1536)
    RowLayout("documents", 4, 32).order(lengths[::-1], 1536)
    again = RowLayout("documents", 4, 32).order(lengths.astype(np.int32), 1536)
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", LAYOUTS)
def test_on_one_device_nothing_moves(name):
    assert not RowLayout(name, 1).moves
    order, segment_of = RowLayout(name, 1).order(np.array([5, 4, 3]), 12)
    assert sorted(order) == list(range(12)) and len(segment_of) == 4


def test_a_seq_len_that_cannot_be_divided_is_refused_by_name():
    with pytest.raises(UserError, match=r"data.seq_len=24 is not divisible by 2 x mesh.seq=8, .*'zigzag'"):
        RowLayout("zigzag", 8).check(24)
    for name in ("contiguous", "striped", "documents"):
        RowLayout(name, 8).check(24)
    with pytest.raises(UserError, match=r"data.seq_len=20 is not divisible by mesh.seq=8, .*'documents'"):
        RowLayout("documents", 8).check(20)
    RowLayout("zigzag", 1).check(25)


def test_the_mesh_offers_every_layout():
    assert ("auto", *LAYOUTS) == mesh.LAYOUTS


def test_the_source_of_a_document_follows_its_new_number_and_keeps_its_place():
    lengths, layout = [1, 2, 4, 9], RowLayout("documents", 2, block=1)
    segments = np.repeat([1, 2, 3, 4], lengths)[None].astype(np.int32)
    tokens = 10 * segments
    sources = np.array([[1, 1, 2, 3, 4, 4, 0, 0]], np.int32)
    arrays = {
        "tokens": tokens,
        "segments": segments,
        "source_tokens": 10 * sources,
        "source_segments": sources,
    }
    laid = lay_out(arrays, layout)
    number_of = dict(zip(laid["tokens"][0].tolist(), laid["segments"][0].tolist(), strict=True))
    assert number_of[20] != 2  # the case is one in which numbers change
    np.testing.assert_array_equal(laid["source_tokens"], arrays["source_tokens"])
    expected = [number_of.get(token, 0) for token in laid["source_tokens"][0].tolist()]
    assert laid["source_segments"][0].tolist() == expected
