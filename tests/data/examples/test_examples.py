"""Every task makes valid examples of records, and stores and packed rows give back every column of them."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from families import examples_of

from llmjax.data.examples.contract import OPTIONAL_COLUMNS, Example
from llmjax.data.examples.copies import Copies
from llmjax.data.examples.table import EXAMPLES
from llmjax.data.packing.make_plan import cached_plan, plan_packing
from llmjax.data.packing.two_streams import SourceStream
from llmjax.data.pipeline import FIELDS_OF_COLUMN, PackedSequences
from llmjax.data.sources.listing import list_sources
from llmjax.data.store.build import build_store
from llmjax.data.store.cache import cached_store
from llmjax.data.store.encode import encode_records
from llmjax.data.store.store import open_store
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.errors import UserError
from llmjax.tasks.table import TASKS

BYTES = ByteTokenizer()


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A task that fills every column: a translation with a class label. Half of the target has more weight."""

    fields: tuple[str, ...] = ("zh", "en", "topic")
    columns: tuple[str, ...] = OPTIONAL_COLUMNS
    version: int = 1

    def encode(self, record, tokenizer):
        target = [tokenizer.bos_id, *tokenizer.encode(record["zh"]), tokenizer.eos_id]
        half = len(target) // 2
        weights = ((half, 0.25), (len(target) - half, 1.0))
        return Example(target, weights, tokenizer.encode(record["en"]), record["topic"])


def pair(i):
    return {"zh": "春江潮水连海平"[: i % 7 + 1], "en": "the spring river " * (i % 5 + 1), "topic": i % 3 - 1}


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        lines = [json.dumps(pair(i)) for i in range(40 if name == "a" else 5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return list_sources([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])


@pytest.fixture
def store(files, tmp_path):
    return build_store(tmp_path / "store", files, BYTES, examples=Pairs())


def test_both_halves_of_every_task_have_the_same_names():
    assert set(EXAMPLES) == set(TASKS)


@pytest.mark.parametrize("task", EXAMPLES)
def test_examples_can_be_pickled_and_fill_the_columns_that_they_name(task):
    labels = {"labels": ("c", "人工 ab")} if task == "classification" else {}
    examples = pickle.loads(pickle.dumps(examples_of(task, **labels)))
    assert (
        repr(examples)
        == repr(examples_of(task, **labels))
        != repr(examples_of(task, text_field="body", **labels))
    )
    assert set(examples.columns) <= set(OPTIONAL_COLUMNS) == set(FIELDS_OF_COLUMN)
    # No two fields of a record have the same text.
    records = [{name: text + "x" * i for i, name in enumerate(examples.fields)} for text in ("人工 ab", "c")]
    if task == "classification":
        records = [record | {"label": record["text"]} for record in records]
    if task == "conversation":
        records = [{"text": json.dumps([text, text], ensure_ascii=False)} for text in ("人工 ab", "c")]
    encoded = encode_records(BYTES, examples, records)
    assert set(encoded.ragged) - {"tokens"} | set(encoded.fixed) - {"num_bytes", "hashes"} == set(
        examples.columns
    )
    assert encoded.fixed["num_bytes"].tolist() == [len(record["text"].encode()) for record in records]


def test_only_the_second_text_of_a_copy_has_weight():
    example = Copies("text").encode({"text": "ab"}, BYTES)
    a, b = BYTES.encode("ab")
    assert list(example.tokens) == [BYTES.bos_id, a, b, BYTES.bos_id, a, b, BYTES.eos_id]
    weights = np.repeat([w for _, w in example.weights], [n for n, _ in example.weights])
    assert weights.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_store_gives_back_every_column(store):
    assert len(store) == 45
    records = [pair(i) for i in range(40)] + [pair(i) for i in range(5)]
    for i, record in enumerate(records):
        example = Pairs().encode(record, BYTES)
        assert store.tokens(i).tolist() == list(example.tokens)
        assert store.source(i).tolist() == list(example.source)
        expected = np.repeat([w for _, w in example.weights], [n for n, _ in example.weights])
        np.testing.assert_array_equal(store.weights(i), expected.astype(np.float32))
        np.testing.assert_array_equal(store.weights(i, 1, 3), expected[1:3].astype(np.float32))
        assert store.num_bytes[i] == len(record["zh"].encode())
    assert store.labels.tolist() == [record["topic"] for record in records]
    # Files are read by name, and a.jsonl is the second entry of data.sources.
    assert store.origins.tolist() == [1] * 40 + [0] * 5
    assert store.source_lengths.tolist() == [len(record["en"]) for record in records]


def test_records_with_different_sources_have_different_hashes(store):
    assert len(set(store.hashes.tolist())) == len({json.dumps(pair(i)) for i in range(40)})


def test_each_optional_column_is_part_of_the_content_fingerprint(files, tmp_path):
    found = set()
    for columns in ((), ("weights",), ("source",), ("label",), OPTIONAL_COLUMNS):

        def encode(record, tokenizer, columns=columns):
            full = dataclasses.asdict(Pairs().encode(record, tokenizer))
            return Example(full["tokens"], **{c: full[c] for c in columns})

        examples = Pairs(columns=columns)
        object.__setattr__(examples, "encode", encode)
        header = build_store(tmp_path / "s", files, BYTES, examples=examples).header
        found.add(header.content_fingerprint)
    assert len(found) == 5


def test_examples_that_do_not_match_their_columns_are_refused():
    with pytest.raises(ValueError, match="do not name"):
        encode_records(BYTES, Pairs(columns=()), [pair(0)])
    short = Pairs()
    object.__setattr__(short, "encode", lambda record, tokenizer: Example([1, 2], ((1, 1.0),)))
    with pytest.raises(ValueError, match="do not cover"):
        encode_records(BYTES, short, [pair(0)])


def test_another_task_version_or_order_of_sources_builds_another_store(files, tmp_path):
    cache, folders = tmp_path / "cache", set()
    for examples in (Pairs(), Pairs(version=2), Pairs(fields=("zh", "topic", "en"))):
        folders.add(cached_store(cache, files, BYTES, examples=examples).directory.name)
    reordered = list_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    folders.add(cached_store(cache, reordered, BYTES, examples=Pairs()).directory.name)
    assert len(folders) == 4


def test_a_task_with_several_fields_refuses_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt', a file of plain text, which has no field 'en'"):
        build_store(tmp_path / "s", list_sources([str(tmp_path / "a.txt")]), BYTES, examples=Pairs())


@pytest.mark.parametrize("name", ["source-00000.bin", "weights-00000.bin", "label.bin", "source_lengths.bin"])
def test_damage_in_an_optional_column_is_found(store, name):
    data = bytearray((store.directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (store.directory / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        open_store(store.directory).check_all()


def test_a_packed_row_holds_both_streams_of_its_documents(store, tmp_path):
    source = SourceStream(np.asarray(store.source_lengths), 96)
    plan = cached_plan(store.lengths, np.arange(45), 64, 0, tmp_path / "plans", source=source)
    sequences = pickle.loads(
        pickle.dumps(PackedSequences(store, plan, 3, repeat=False, columns=OPTIONAL_COLUMNS))
    )
    batch = sequences.read(np.arange(plan.num_rows))
    assert batch["source_tokens"].shape == (plan.num_rows, 96) == batch["source_positions"].shape
    found = []
    for row in range(plan.num_rows):
        assert set(batch["segments"][row]) - {0} == set(batch["source_segments"][row]) - {0}
        spans = sequences.spans(np.array([row]))
        for segment, (doc, start, stop) in enumerate(spans, 1):
            here, there = batch["segments"][row] == segment, batch["source_segments"][row] == segment
            # Documents with two streams are never cut.
            assert (start, stop) == (0, store.lengths[doc])
            np.testing.assert_array_equal(batch["targets"][row, here], store.tokens(doc, 1))
            np.testing.assert_array_equal(batch["weights"][row, here], store.weights(doc, 1))
            np.testing.assert_array_equal(batch["source_tokens"][row, there], store.source(doc))
            np.testing.assert_array_equal(batch["source_positions"][row, there], np.arange(there.sum()))
            found.append(doc)
    assert sorted(found) == list(range(45))
    assert not batch["weights"][batch["segments"] == 0].any()


def test_weights_follow_a_document_that_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 50)
    store = build_store(
        tmp_path / "s", list_sources([str(tmp_path / "a.txt")]), BYTES, examples=Copies("text")
    )
    plan = plan_packing(store.lengths, np.arange(1), 16, 0)
    batch = PackedSequences(store, plan, 0, repeat=False, columns=("weights",)).read(np.arange(plan.num_rows))
    # The copy has 50 tokens, and eos is one more target.
    assert batch["weights"].sum() == 51
    # The rows are put together in the order in which their pieces lie in the document.
    first = {int(start): batch["weights"][row] for row in range(plan.num_rows)
             for _, start, _ in PackedSequences(store, plan, 0).spans(np.array([row]))}  # fmt: skip
    joined = np.concatenate([first[start] for start in sorted(first)])[: int(store.lengths[0]) - 1]
    np.testing.assert_array_equal(joined, store.weights(0, 1))
