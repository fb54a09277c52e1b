"""Batches hold the tokens of the documents, in an order that depends on the sequence number alone."""

import dataclasses
import importlib.util
import pathlib
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import llmjax.batch
from llmjax.data.layout.layout import LAYOUTS, RowLayout, lay_out
from llmjax.data.packing.make_plan import cached_plan, plan_packing
from llmjax.data.pipeline import DataConfig, PackedSequences, make_batches
from llmjax.data.sources.listing import list_sources
from llmjax.data.store.build import build_store
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {"tokens", "targets", "weights", "segments", "positions", "index"}
T = 32


class FakeStore:
    """A store in memory. Token k of document d is 100 * d + k + 1, so that a token tells its document and position."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def tokens(self, doc, start, stop):
        assert 0 <= start < stop <= self.lengths[doc]
        return (100 * doc + np.arange(start, stop) + 1).astype(np.uint16)

    def name(self, doc):
        return f"document-{doc}"


def make_source(num_documents=60, seed=0, repeat=True):
    lengths = np.random.default_rng(0).integers(2, 90, num_documents)
    plan = plan_packing(lengths, np.arange(num_documents), T, seed)
    return PackedSequences(FakeStore(lengths), plan, seed, repeat=repeat)


@pytest.fixture(scope="module")
def source():
    return make_source()


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def join(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(first, second):
    assert first.keys() == second.keys() and first.keys() - {"columns"} == FIELDS
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype


def test_an_epoch_predicts_every_target_of_every_document_exactly_once(source):
    batch = source.read(np.arange(source.plan.num_rows))
    used = batch["weights"] > 0
    assert (batch["targets"][used] == batch["tokens"][used] + 1).all()
    expected = [100 * doc + k + 1 for doc, n in enumerate(source.store.lengths.tolist()) for k in range(1, n)]
    assert sorted(batch["targets"][used].tolist()) == expected


def test_segments_and_positions_follow_the_documents(source):
    batch = source.read(np.arange(source.plan.num_rows))
    for tokens, segments, positions in zip(batch["tokens"], batch["segments"], batch["positions"]):
        used = np.count_nonzero(segments)
        assert (segments[used:] == 0).all()
        edges = np.flatnonzero(np.diff(segments[:used])) + 1
        pieces = np.split(np.arange(used), edges)
        assert segments[:used].tolist() == [n for n, piece in enumerate(pieces, 1) for _ in piece]
        for piece in pieces:
            assert positions[piece].tolist() == list(range(len(piece)))
            # The tokens of a piece come from one document and have no gap.
            assert (tokens[piece] == tokens[piece[0]] + positions[piece]).all()


def test_padding_is_zero_in_all_fields(source):
    batch = source.read(np.arange(source.plan.num_rows))
    padding = batch["segments"] == 0
    assert 0 < padding.sum() == padding.size - source.plan.num_tokens
    for name in ("tokens", "targets", "weights", "positions"):
        assert not batch[name][padding].any()
    assert (batch["weights"][~padding] == 1).all()


def test_fields_and_types_are_those_of_the_batch(source):
    batch = source.read(np.array([3, 2**31 + 5]))
    assert set(batch) == FIELDS == {name for name, field in llmjax.batch.FIELDS.items() if not field.optional}
    types = {name: array.dtype for name, array in batch.items()}
    assert types.pop("weights") == np.float32 and set(types.values()) == {np.dtype(np.int32)}
    assert {array.shape for name, array in batch.items() if name != "index"} == {(2, T)}
    assert batch["index"].tolist() == [3, 5]


def test_a_sequence_is_a_pure_function_of_its_number(source):
    n = source.plan.num_rows
    whole = source.read(np.arange(3 * n))
    numbers = np.random.default_rng(1).integers(0, 3 * n, 50)
    again = make_source().read(numbers)
    assert_same(again, {name: array[numbers] for name, array in whole.items()})


def test_each_epoch_has_the_same_rows_in_another_order(source):
    n = source.plan.num_rows
    epochs = [source.read(np.arange(n) + e * n)["tokens"].tolist() for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_documents_of_a_sequence_are_named_with_their_spans(source):
    numbers = np.array([7, 2])
    batch = source.read(numbers)
    expected = []
    for tokens, segments in zip(batch["tokens"], batch["segments"]):
        for segment in range(1, segments.max() + 1):
            first, *_, last = [*tokens[segments == segment].tolist()] * 2
            expected.append((f"document-{first // 100}", first % 100 - 1, last % 100 + 1))
    assert source.documents(numbers) == expected


def test_survives_pickling_with_a_plan_in_memory_or_mapped(source, tmp_path):
    mapped = cached_plan(source.store.lengths, np.arange(60), T, 0, tmp_path)
    expected = source.read(np.arange(9))
    for original in (source, PackedSequences(source.store, mapped, 0)):
        assert_same(pickle.loads(pickle.dumps(original)).read(np.arange(9)), expected)


def test_beyond_the_end_evaluation_reads_padding():
    source = make_source(repeat=False)
    n = source.plan.num_rows
    batch = source.read(np.array([0, n, 5 * n + 3]))
    assert batch["segments"][0].any()
    for name in FIELDS - {"index"}:
        assert not batch[name][1:].any()
    assert source.documents(np.array([n])) == []


def test_every_token_of_a_store_on_disk_is_predicted_once(tmp_path):
    for number, text in enumerate(["short", "one that is longer than a row of positions", "", "漢字\n"]):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    store = build_store(tmp_path / "store", list_sources([str(tmp_path / "*.txt")]), ByteTokenizer())
    plan = cached_plan(store.lengths, np.arange(len(store)), T, 0, tmp_path)
    source = pickle.loads(pickle.dumps(PackedSequences(store, plan, 0)))
    with make_batches(source, start=0, batch_size=plan.num_rows) as batches:
        batch = next(batches)
    expected = np.concatenate([store.tokens(doc, 1, n) for doc, n in enumerate(store.lengths.tolist())])
    assert sorted(batch["targets"][batch["weights"] > 0].tolist()) == sorted(expected.tolist())
    names = {pathlib.Path(name).name for name, _, _ in source.documents(np.arange(plan.num_rows))}
    assert names == {"0.txt", "1.txt", "3.txt"}


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_evaluation_sees_every_target_once_whatever_the_batch_size(batch_size):
    source = make_source(repeat=False)
    n = source.plan.num_rows
    with make_batches(source, start=0, batch_size=batch_size, stop=n) as batches:
        read = list(batches)
    assert len(read) == -(-n // batch_size)
    assert {len(batch["tokens"]) for batch in read} == {batch_size}
    assert join(read)["weights"].sum() == source.plan.num_tokens


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_moves_the_columns_of_each_row_and_keeps_their_content(source, name, shards):
    plain = source.read(np.arange(40))
    batch = lay_out(plain, RowLayout(name, shards, block=2))
    assert batch.keys() - plain.keys() == (set() if name == "contiguous" else {"columns"})
    columns = batch.get("columns", np.broadcast_to(np.arange(T), (40, T)))
    np.testing.assert_array_equal(batch["tokens"], np.take_along_axis(plain["tokens"], columns, 1))
    fields = ("segments", "positions", "tokens", "targets", "weights")
    for row in range(40):
        before, after = (np.stack([arrays[field][row] for field in fields]) for arrays in (plain, batch))
        # A layout may renumber segments, so that they are compared token by token.
        by_token = [
            part[:, np.lexsort((part[1], part[2]))]
            for part in (before[:, before[0] > 0], after[:, after[0] > 0])
        ]
        np.testing.assert_array_equal(by_token[0][1:], by_token[1][1:])
        pairs = set(zip(*(part[0].tolist() for part in by_token)))
        assert len(pairs) == before[0].max() == after[0].max()
        assert not after[:, after[0] == 0].any()
    np.testing.assert_array_equal(batch["index"], plain["index"])
    assert {array.dtype for array in batch.values()} == {array.dtype for array in plain.values()}
    assert (batch["positions"] != plain["positions"]).any() == (name != "contiguous")


def test_rows_of_padding_can_be_laid_out():
    source = make_source(repeat=False)
    for name in LAYOUTS:
        batch = lay_out(source.read(np.array([0, source.plan.num_rows])), RowLayout(name, 4))
        assert batch["segments"][0].any() and not batch["segments"][1].any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_hosts_and_prefetch_do_not_change_laid_out_sequences(source, name):
    layout = RowLayout(name, 4, block=4)
    parts = [
        take(
            make_batches(
                source,
                start=7,
                batch_size=8,
                local_rows=np.arange(4) + 4 * host,
                prefetch=host,
                layout=layout,
            ),
            3,
        )
        for host in range(2)
    ]
    together = join([part[number] for number in range(3) for part in parts])
    assert_same(together, lay_out(source.read(np.arange(7, 7 + 24)), layout))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 8, 24])
def test_hosts_batch_size_and_prefetch_do_not_change_the_sequences(source, hosts, batch_size, prefetch):
    count = 48 // batch_size
    per_host = batch_size // hosts
    parts = [
        take(
            make_batches(
                source,
                start=13,
                batch_size=batch_size,
                local_rows=np.arange(per_host) + host * per_host,
                prefetch=prefetch,
            ),
            count,
        )
        for host in range(hosts)
    ]
    together = join([part[number] for number in range(count) for part in parts])
    assert_same(together, source.read(np.arange(13, 13 + 48)))


@pytest.mark.parametrize("consumed", [0, 1, 16, 1000])
def test_a_restart_at_any_cursor_continues_with_the_same_sequences(source, consumed):
    whole = take(make_batches(source, start=consumed, batch_size=6), 8)
    before = take(make_batches(source, start=consumed, batch_size=6), 3)
    after = take(make_batches(source, start=consumed + 18, batch_size=15), 2)
    assert_same(join(before + after), join(whole))


def test_a_process_may_read_scattered_rows(source):
    rows = np.array([1, 2, 6])
    read = take(make_batches(source, start=5, batch_size=8, local_rows=rows), 2)
    assert_same(join(read), source.read(np.concatenate([5 + rows, 13 + rows])))


def test_repeating_sequences_must_not_stop_in_the_middle_of_a_batch(source):
    with pytest.raises(ValueError, match="10 sequences are no multiple of the batch size 4"):
        make_batches(source, start=0, batch_size=4, stop=10)
    with make_batches(source, start=2, batch_size=4, stop=10) as batches:
        assert len(list(batches)) == 2


def test_closing_ends_the_thread_also_after_an_error_in_it(source):
    def prefetching():
        return [thread for thread in threading.enumerate() if "prefetch" in thread.name]

    with make_batches(source, start=0, batch_size=4) as batches:
        next(batches)
        assert prefetching()
    assert not prefetching()
    # Closing twice is allowed.
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)

    # A store with shorter documents than the plan raises AssertionError in the thread.
    lengths = source.store.lengths.copy()
    broken = PackedSequences(FakeStore(lengths // 2), source.plan, 0)
    with make_batches(broken, start=0, batch_size=60) as batches, pytest.raises(AssertionError):
        next(batches)
    assert not prefetching()


def test_a_program_that_leaves_batches_open_ends_without_an_error():
    # The function given to atexit first runs last: it prints the threads that are left.
    program = """
import atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
from tests.data.test_pipeline import make_source, make_batches
batches = make_batches(make_source(2000), start=0, batch_size=512, prefetch=4)
next(batches)
print("read")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n['MainThread']\n", "")


def test_an_empty_plan_has_nothing_to_read():
    with pytest.raises(ValueError, match="plan is empty"):
        PackedSequences(FakeStore([1]), plan_packing(np.array([1]), np.arange(1), T, 0), 0)


def base_data_section():
    spec = importlib.util.spec_from_file_location("base", ROOT / "configs" / "base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().data.to_dict()


def test_the_config_is_the_data_section_of_base():
    assert set(base_data_section()) == {field.name for field in dataclasses.fields(DataConfig)}
    DataConfig(**base_data_section())


@pytest.mark.parametrize(
    "key, value",
    [
        ("sources", ()),
        ("text_field", ""),
        ("on_bad_text", "ignore"),
        ("seq_len", 0),
        ("held_out_fraction", 1.0),
        ("held_out_fraction", -0.1),
        ("num_workers", -1),
        ("prefetch", -1),
    ],
)
def test_a_value_out_of_range_is_named(key, value):
    with pytest.raises(UserError, match=f"data.{key}="):
        DataConfig(**{**base_data_section(), key: value})
