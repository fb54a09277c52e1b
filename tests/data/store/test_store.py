"""A token store holds every document, is the same however it was built, and is never used if it is damaged."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sections import section

import llmjax.data.store.build
import llmjax.data.store.cache
from llmjax.data.examples.documents import Documents
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.reading import Reading
from llmjax.data.store.build import DOCUMENTS, build_store
from llmjax.data.store.cache import cached_store, cached_tokenizer
from llmjax.data.store.columns import token_dtype
from llmjax.data.store.encode import encode_batches, encode_records
from llmjax.data.store.store import Store, open_store
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.errors import UserError

BYTES = ByteTokenizer(num_reserved=2)


def text_of(i):
    return f"document {i}: ▁ 中文 " + "lorem ipsum\n" * (i % 7)


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(20):
        (root / f"{i:02d}.txt").write_text(text_of(i))
    with open(root / "rows.jsonl", "w") as file:
        for i in range(20, 60):
            file.write(json.dumps({"text": text_of(i)}) + "\n")
        file.write('{"text": ""}\n')
    return root


@pytest.fixture
def store(corpus, tmp_path):
    return build_store(tmp_path / "store", list_sources([str(corpus)]), BYTES)


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir())}


def test_every_document_is_stored_between_bos_and_eos(store):
    assert len(store) == store.header.num_documents == 60
    for i in range(60):
        ids = store.tokens(i)
        assert ids.dtype == np.uint16 and len(ids) == store.lengths[i]
        assert (ids[0], ids[-1]) == (BYTES.bos_id, BYTES.eos_id)
        assert BYTES.decode(ids[1:-1]) == text_of(i)
        assert store.num_bytes[i] == len(text_of(i).encode())
    assert store.name(3) == "03.txt"
    assert store.name(59) == store.name(-1) == "rows.jsonl#40"


def test_the_header_counts_what_is_there(store):
    assert store.header.num_tokens == sum(store.header.shards["tokens"]) == store.lengths.sum()
    assert store.header.num_bytes == store.num_bytes.sum()
    assert store.header.empty == 1
    assert store.header.skipped == store.header.replaced == 0
    assert store.header.tokenizer_fingerprint == BYTES.fingerprint


def test_the_content_fingerprint_depends_on_tokens_and_document_borders(tmp_path):
    (tmp_path / "c").mkdir()
    found = set()
    for texts in (["ab", "c"], ["ab", "d"], ["a", "bc"], ["c", "ab"]):
        for i, text in enumerate(texts):
            (tmp_path / "c" / f"{i}.txt").write_text(text)
        found.add(
            build_store(tmp_path / "s", list_sources([str(tmp_path / "c")]), BYTES).header.content_fingerprint
        )
    assert len(found) == 4


def test_a_slice_is_a_view_of_the_memory_map(store):
    whole, part = store.tokens(5), store.tokens(5, 3, 9)
    np.testing.assert_array_equal(part, whole[3:9])
    assert np.shares_memory(part, whole)
    assert not part.flags.writeable
    assert not part.flags.owndata
    assert len(store.tokens(5, 4, 4)) == 0
    for bad in [(-1, 3), (4, 3), (0, len(whole) + 1)]:
        with pytest.raises(IndexError):
            store.tokens(5, *bad)
    with pytest.raises(IndexError):
        store.name(60)


def test_small_shards_hold_whole_documents_and_read_the_same(store, corpus, tmp_path):
    sharded = build_store(tmp_path / "sharded", list_sources([str(corpus)]), BYTES, shard_bytes=500)
    assert len(sharded.header.shards["tokens"]) > 5
    assert max(sharded.header.shards["tokens"]) <= 250
    assert sharded.header.content_fingerprint == store.header.content_fingerprint
    for i in range(60):
        np.testing.assert_array_equal(sharded.tokens(i), store.tokens(i))


def test_a_document_longer_than_a_shard_gets_its_own(corpus, tmp_path):
    store = build_store(tmp_path / "s", list_sources([str(corpus)]), BYTES, shard_bytes=1)
    assert list(store.header.shards["tokens"]) == store.lengths.tolist()
    assert BYTES.decode(store.tokens(41)[1:-1]) == text_of(41)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(llmjax.data.store.build, "_INLINE_BYTES", 0)
    monkeypatch.setattr(llmjax.data.store.build, "_BATCH_CHARS", 200)
    files = list_sources([str(corpus)])
    build_store(tmp_path / "one", files, BYTES, num_workers=1)
    build_store(tmp_path / "many", files, BYTES, num_workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_workers_return_batches_in_order_and_raise_what_was_raised():
    batches = [(i, [{"text": text_of(i)}] * (i % 4)) for i in range(50)]
    for tag, encoded in encode_batches(BYTES, DOCUMENTS, iter(batches), 3):
        expected = encode_records(BYTES, DOCUMENTS, batches[tag][1])
        np.testing.assert_array_equal(encoded.ragged["tokens"][0], expected.ragged["tokens"][0])
        np.testing.assert_array_equal(encoded.fixed["hashes"], expected.fixed["hashes"])
    assert tag == 49
    with pytest.raises(UserError, match="lone surrogate"):
        list(encode_batches(BYTES, DOCUMENTS, [(0, [{"text": "a"}]), (1, [{"text": "b\ud800"}])], 2))


def test_workers_end_when_the_iterator_is_closed():
    def pids():
        """The child processes of this process."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.add(path.parent.name)
        return found

    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc to count processes with")
    before = pids()
    encoding = encode_batches(BYTES, DOCUMENTS, ((i, [{"text": "x"}]) for i in range(1000)), 2)
    next(encoding)
    assert len(pids() - before) == 2
    encoding.close()
    assert pids() == before


def test_workers_do_not_import_jax():
    code = "import sys, llmjax.data.store.encode; assert not {'jax', 'grain', 'flax'} & set(sys.modules)"
    root = Path(llmjax.data.store.build.__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_large_vocabularies_take_four_bytes_a_token(tmp_path):
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.uint32

    class Large(ByteTokenizer):
        def __init__(self):
            super().__init__(num_reserved=70_000)

    (tmp_path / "a.txt").write_text("abc")
    store = build_store(tmp_path / "s", list_sources([str(tmp_path / "a.txt")]), Large())
    assert store.tokens(0).dtype == np.uint32
    assert Large().decode(store.tokens(0)) == "abc"


def test_a_pickled_store_reads_the_same(store, monkeypatch, tmp_path):
    data = pickle.dumps(store)
    assert len(data) < 500
    monkeypatch.chdir(tmp_path.parent)
    np.testing.assert_array_equal(pickle.loads(data).tokens(7), store.tokens(7))
    monkeypatch.chdir(tmp_path)
    relative = pickle.dumps(Store("store"))
    monkeypatch.chdir(tmp_path.parent)
    assert len(pickle.loads(relative)) == 60


def test_the_split_does_not_move_when_documents_are_added(store, corpus, tmp_path):
    train, held_out = store.split(0.3)
    assert sorted([*train, *held_out]) == list(range(60))
    assert 6 < len(held_out) < 30
    for i in range(5):
        (corpus / f"000{i}.txt").write_text(f"new {i}")
    more = build_store(tmp_path / "more", list_sources([str(corpus)]), BYTES)
    before = {store.name(i) for i in held_out}
    after = {more.name(i) for i in more.split(0.3)[1]}
    assert after - {f"000{i}.txt" for i in range(5)} == before


def test_the_split_follows_the_text_and_grows_with_the_fraction(store, tmp_path):
    previous = set()
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        held_out = set(store.split(fraction)[1].tolist())
        assert held_out == set(np.flatnonzero(store.is_held_out(fraction)).tolist()) >= previous
        previous = held_out
    assert len(store.split(0.0)[1]) == 0 and len(store.split(1.0)[0]) == 0
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the same text")
    twins = build_store(tmp_path / "twins", list_sources([str(tmp_path / "*.txt")]), BYTES)
    assert twins.hashes[0] == twins.hashes[1]
    with pytest.raises(UserError, match=r"data\.held_out_fraction = 1.5"):
        store.split(1.5)


def test_a_build_that_fails_midway_leaves_nothing(corpus, tmp_path, monkeypatch):
    calls = []
    real = llmjax.data.store.build._Writer.add

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk full")
        real(self, *args)

    monkeypatch.setattr(llmjax.data.store.build._Writer, "add", fails)
    monkeypatch.setattr(llmjax.data.store.build, "_BATCH_CHARS", 100)
    with pytest.raises(OSError, match="disk full"):
        build_store(tmp_path / "store", list_sources([str(corpus)]), BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus"]


def test_a_failed_rebuild_leaves_the_store_that_was_there(store, corpus):
    before = contents(store.directory)
    (corpus / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        build_store(store.directory, list_sources([str(corpus)]), BYTES)
    assert contents(store.directory) == before


def test_a_killed_builder_leaves_no_store_and_its_files_are_deleted_later(corpus, tmp_path):
    code = (
        "import os, signal, sys\n"
        "import llmjax.data.store.build as s\n"
        "from llmjax.data.sources.listing import list_sources\n"
        "from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer\n"
        "s._finish = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.build_store(sys.argv[2], list_sources([sys.argv[1]]), ByteTokenizer())\n"
    )
    root = Path(llmjax.data.store.build.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == -9
    left = next(tmp_path.glob("store.building-*"))
    for path in (tmp_path / "store", left):
        with pytest.raises(UserError, match=r"no readable header\.json"):
            open_store(path)
    build_store(tmp_path / "store", list_sources([str(corpus)]), BYTES)
    # The other builder may still be alive, because its files were written a moment ago.
    assert left.exists()
    old = time.time() - 7 * 3600
    for path in [*left.iterdir(), left]:
        os.utime(path, (old, old))
    build_store(tmp_path / "store", list_sources([str(corpus)]), BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "store"]


def test_rebuilding_replaces_the_store_and_concurrent_builders_agree(corpus, tmp_path):
    files = list_sources([str(corpus)])
    first = build_store(tmp_path / "store", files[:5], BYTES)
    nested = []

    def another(done, total):
        if not nested:
            nested.append(1)
            nested.append(build_store(tmp_path / "store", files, BYTES))

    second = build_store(tmp_path / "store", files, BYTES, progress=another)
    assert contents(nested[1].directory) == contents(second.directory)
    assert len(second) == 60 and len(first) == 5
    # An open store can still be read after it was replaced.
    assert BYTES.decode(first.tokens(4)) == text_of(4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "store"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "header.json").unlink(), "no readable header"),
        (lambda d: (d / "header.json").write_text("{"), "no readable header"),
        (lambda d: (d / "header.json").write_text('{"format_version": 99}'), "format 99"),
        (lambda d: (d / "tokens-00000.bin").write_bytes(b"xx"), r"damaged \(tokens-00000.bin has 2 bytes"),
        (lambda d: (d / "tokens_starts.bin").unlink(), r"damaged \(tokens_starts.bin has 0 bytes"),
    ],
)
def test_a_damaged_store_is_refused(store, damage, message):
    damage(store.directory)
    with pytest.raises(UserError, match=message) as error:
        open_store(store.directory)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_did_not_make_the_store_is_refused(store):
    assert len(open_store(store.directory, BYTES)) == 60
    with pytest.raises(UserError, match="was made by tokenizer"):
        open_store(store.directory, tokenizer=ByteTokenizer(num_reserved=3))


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"no document with text \(2 files, 1 documents empty, 1 skipped\)"):
        build_store(tmp_path / "s", list_sources([str(tmp_path)]), BYTES, reading=Reading(on_bad_text="skip"))


def test_dropped_and_replaced_documents_are_counted_in_the_header(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"b\xff")
    files = list_sources([str(tmp_path)])
    assert build_store(tmp_path / "s", files, BYTES, reading=Reading(on_bad_text="skip")).header.skipped == 1
    replaced = build_store(tmp_path / "r", files, BYTES, reading=Reading(on_bad_text="replace"))
    assert replaced.header.replaced == 1
    assert BYTES.decode(replaced.tokens(1)) == "b\ufffd"


def test_progress_rises_to_the_total(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(llmjax.data.store.build, "_BATCH_CHARS", 200)
    seen = []
    files = list_sources([str(corpus)])
    build_store(tmp_path / "s", files, BYTES, progress=lambda done, total: seen.append((done, total)))
    total = sum(file.size for file in files)
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert 0 < seen[0][0] < total / 4


def test_a_cached_store_is_built_again_only_when_something_changed(corpus, tmp_path, monkeypatch):
    built = []
    real = llmjax.data.store.cache.build_store

    def counted(*args, **options):
        built.append(args)
        return real(*args, **options)

    monkeypatch.setattr(llmjax.data.store.cache, "build_store", counted)
    cache = tmp_path / "cache"
    for _ in range(2):
        store = cached_store(cache, list_sources([str(corpus)]), BYTES)
    assert len(built) == 1
    cached_store(cache, list_sources([str(corpus)]), BYTES, reading=Reading(on_bad_text="skip"))
    cached_store(cache, list_sources([str(corpus)]), ByteTokenizer(num_reserved=3))
    assert len(built) == 3
    (store.directory / "tokens_lengths.bin").write_bytes(b"")
    assert len(cached_store(cache, list_sources([str(corpus)]), BYTES)) == 60
    assert len(built) == 4
    (corpus / "new.txt").write_text("new")
    assert len(cached_store(cache, list_sources([str(corpus)]), BYTES)) == 61
    assert len(built) == 5


def test_a_cached_tokenizer_is_trained_once(corpus, tmp_path, monkeypatch):
    trained = []
    real = llmjax.data.store.cache.train_tokenizer

    def counted(config, texts):
        trained.append(config)
        return real(config, texts)

    monkeypatch.setattr(llmjax.data.store.cache, "train_tokenizer", counted)
    cache, files = tmp_path / "cache", list_sources([str(corpus)])
    config = section("tokenizer", vocab_size=300)
    seen = []
    first = cached_tokenizer(cache, config, files, progress=lambda *a: seen.append(a))
    again = cached_tokenizer(cache, config, files)
    assert first.fingerprint == again.fingerprint
    assert len(trained) == 1
    assert seen[-1][0] == seen[-1][1] == sum(file.size for file in files)
    cached_tokenizer(cache, section("tokenizer", vocab_size=301), files)
    assert len(trained) == 2
    first.save(tmp_path / "saved")
    given = cached_tokenizer(cache, section("tokenizer", path=str(tmp_path / "saved")), files)
    assert given.fingerprint == first.fingerprint
    assert isinstance(cached_tokenizer(cache, section("tokenizer", kind="byte"), files), ByteTokenizer)
    assert len(trained) == 2


def test_compressed_chinese_rows_are_stored_losslessly_by_workers(shared_data, tmp_path):
    path = shared_data / "parallel/python_docs_zh/train.jsonl.gz"
    store = build_store(
        tmp_path / "s", list_sources([str(path)]), BYTES, examples=Documents("zh"), num_workers=2
    )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [text for line in file if (text := json.loads(line)["zh"])]
    assert len(store) == len(texts) > 40_000
    assert store.num_bytes.tolist() == [len(text.encode()) for text in texts]
    for i in range(0, len(texts), 997):
        assert BYTES.decode(store.tokens(i)) == texts[i]
