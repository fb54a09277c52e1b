"""Span corruption: gaps of the published kind at drawn places, from which the text can be put together again."""

import collections
import dataclasses
import math

import jax
import numpy as np
import pytest
from sections import section

from llmjax.data.examples.span_corruption import SpanCorruptions, corruption_of, stream_lengths
from llmjax.data.store.encode import encode_records
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.errors import UserError
from llmjax.parallel.rules import Layout
from llmjax.tasks.span_corruption import draw_spans
from llmjax.types import Batch

TOKENIZER = ByteTokenizer()
T, S = 48, 160
EXAMPLES = SpanCorruptions("text", 0.15, 3.0, 16, T, S)
TEXTS = ["The quick brown fox, 春江潮水连海平 jumps over 13 lazy dogs.", "a", "", "ab", "span corruption"]
SENTINELS = TOKENIZER.reserved_ids[:16][::-1]
TARGET, SOURCE = ("tokens", "targets", "segments", "positions"), ("tokens", "segments", "positions")


def rows_of(texts, rows, first=0, examples=EXAMPLES):
    """`rows` rows with the same texts."""
    arrays = {name: np.zeros((rows, T), np.int32) for name in TARGET}
    arrays |= {f"source_{name}": np.zeros((rows, S), np.int32) for name in SOURCE}

    def put(at, segment, prefix="", **values):
        n = len(next(iter(values.values())))
        for name, value in {**values, "segments": segment, "positions": np.arange(n)}.items():
            arrays[prefix + name][:, at : at + n] = value
        return at + n

    t = s = 0
    for segment, text in enumerate(texts, 1):
        example = examples.encode({"text": text}, TOKENIZER)
        t = put(t, segment, tokens=example.tokens[:-1], targets=example.tokens[1:])
        s = put(s, segment, "source_", tokens=example.source)
    weights = (arrays["segments"] > 0).astype(np.float32)
    return Batch(weights=weights, index=np.arange(first, first + rows, dtype=np.int32), **arrays)


draw = jax.jit(
    lambda batch, seed=0, **keys: draw_spans(batch, section("span_corruption", **keys), seed, Layout()),
    static_argnames=("seed", "rate", "span_len"),
)


def of(batch, row, segment):
    """What is read, and what is to be written, for a document."""
    own, source = batch.segments[row] == segment, batch.source_segments[row] == segment
    tokens, targets = (np.asarray(x)[row][own].tolist() for x in (batch.tokens, batch.targets))
    assert tokens == [TOKENIZER.bos_id, *targets[:-1]]
    return np.asarray(batch.source_tokens)[row][source].tolist(), targets


def filled(source, targets):
    """The kept and taken parts in turn, after the form of both streams was checked."""
    assert source.pop() == targets.pop() == TOKENIZER.eos_id
    gaps = [i for i in source if i in SENTINELS]
    assert gaps == [i for i in targets if i in SENTINELS] == list(SENTINELS[: len(gaps)])
    parts = []
    for gap in gaps:
        kept, source = source[: source.index(gap)], source[source.index(gap) + 1 :]
        ends = [k for k, i in enumerate(targets) if k and i in SENTINELS] or [len(targets)]
        taken, targets = targets[1 : ends[0]], targets[ends[0] :]
        assert kept and taken
        parts += [kept, taken]
    return [*parts, source] if source else parts


def test_filling_the_gaps_gives_the_text_again_and_lengths_are_as_published():
    drawn = draw(rows_of(TEXTS, 50))
    for row in range(50):
        for segment, text in enumerate(TEXTS, 1):
            parts = filled(*of(drawn, row, segment))
            assert [i for part in parts for i in part] == TOKENIZER.encode(text)
            n = len(text.encode())
            taken, spans = corruption_of(n, 0.15, 3.0)
            assert sum(map(len, parts[1::2])) == taken and len(parts[1::2]) == spans
            if n > 1:
                assert taken == max(round(n * 0.15), 1) and spans == max(round(taken / 3), 1)


def test_every_way_to_cut_is_as_likely_as_any_other():
    # 3 gaps of 6 tokens between 9: 10 ways to cut the former, and 28 the latter.
    examples = SpanCorruptions("text", 0.4, 2.0, 16, T, S)
    rows = 4000
    drawn = draw(rows_of(["abcdefghijklmno"], rows, examples=examples), rate=0.4, span_len=2.0)
    counts = collections.Counter(
        tuple(len(part) for part in filled(*of(drawn, row, 1))) for row in range(rows)
    )
    assert len(counts) == math.comb(5, 2) * math.comb(8, 2)
    expected = rows / len(counts)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 279 + 5 * (2 * 279) ** 0.5


def test_gaps_follow_the_sequence_number_and_the_seed_and_nothing_else():
    whole, half = draw(rows_of(TEXTS, 8)), draw(rows_of(TEXTS, 4, first=4))
    for name in ("tokens", "targets", "source_tokens"):
        np.testing.assert_array_equal(getattr(whole, name)[4:], getattr(half, name))
    assert len({row.tobytes() for row in np.asarray(whole.source_tokens)}) == 8
    assert not np.array_equal(draw(rows_of(TEXTS, 8), seed=1).source_tokens, whole.source_tokens)


def test_tokens_in_another_order_have_the_same_gaps():
    batch, order = rows_of(TEXTS, 3), np.random.default_rng(0).permutation(T)
    names = (*TARGET, "weights")
    moved = dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[:, order] for name in names},
        columns=np.tile(order.astype(np.int32), (3, 1)),
    )
    expected, got = draw(batch), draw(moved)
    np.testing.assert_array_equal(got.source_tokens, expected.source_tokens)
    for name in ("tokens", "targets"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name)[:, order])


def test_a_long_text_is_cut_into_parts_of_nearly_equal_lengths_and_nothing_is_lost():
    text = "".join(chr(97 + i % 26) for i in range(1000))
    made = EXAMPLES.encode_several({"text": text}, TOKENIZER)
    lengths = [len(example.source) + len(example.tokens) for example in made]
    assert len(made) == -(-1000 // EXAMPLES.longest) and max(lengths) - min(lengths) <= 3
    parts = [[i for i in (*e.source, *e.tokens) if TOKENIZER.id_to_bytes(i)] for e in made]
    assert [i for part in parts for i in part] == TOKENIZER.encode(text)
    for example in made:
        assert len(example.source) <= S and len(example.tokens) - 1 <= T
    longer = [stream_lengths(EXAMPLES.longest + 1, 0.15, 3.0)]
    assert any(source > S or target > T for source, target in longer)
    few = dataclasses.replace(EXAMPLES, sentinels=2)
    assert corruption_of(few.longest, 0.15, 3.0).spans == 2 < corruption_of(few.longest + 1, 0.15, 3.0).spans
    # All documents of a record are trained on or held out together, and its bytes count once.
    encoded = encode_records(TOKENIZER, EXAMPLES, [{"text": text}, {"text": "ab"}])
    assert encoded.counts.tolist() == [len(made), 1] and len(set(encoded.fixed["hashes"].tolist())) == 2
    assert encoded.fixed["num_bytes"].tolist() == [1000, *[0] * (len(made) - 1), 2]


def test_too_few_sentinels_cost_one_sentence():
    more = dataclasses.replace(EXAMPLES, sentinels=17)
    with pytest.raises(
        UserError, match="span_corruption.sentinels=17 needs as many reserved ids, and the tokenizer ha"
    ):
        more.encode({"text": "ab"}, TOKENIZER)


@pytest.mark.parametrize("changes", [{"seq_len": 2}, {"source_len": 2}])
def test_rows_in_which_no_span_is_taken_out_cost_one_sentence(changes):
    short = dataclasses.replace(EXAMPLES, **changes)
    with pytest.raises(
        UserError, match="leave room for texts of 1 token, of which no span is taken out; raise them"
    ):
        short.encode({"text": "some text"}, TOKENIZER)
