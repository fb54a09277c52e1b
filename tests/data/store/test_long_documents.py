"""Documents that are longer than what is held at once: the same store, whether they come in parts or whole."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from sections import section

import llmjax
from llmjax.data.examples.copies import Copies
from llmjax.data.examples.documents import Documents
from llmjax.data.sources import cutting as cutting_module
from llmjax.data.sources import text as text_module
from llmjax.data.sources.cutting import Cutting
from llmjax.data.sources.listing import list_sources
from llmjax.data.store import build
from llmjax.data.store.build import build_store
from llmjax.data.store.cache import cached_store, cached_tokenizer
from llmjax.data.tokenizer import cuts
from llmjax.data.tokenizer.training import train_tokenizer
from llmjax.errors import UserError

LINE = "Call me Ishmael, 列位看官. Some years ago -- never mind how long\n"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(cuts, "PIECE_CHARS", 700)
    monkeypatch.setattr(build, "PIECE_CHARS", 700)
    monkeypatch.setattr(build, "_INLINE_BYTES", 0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, lines in enumerate((1, 200, 3, 0, 400)):
        (folder / f"{i}.txt").write_text(LINE * lines)
    rows = [{"text": LINE * lines} for lines in (2, 100, 1)]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return list_sources([str(folder)])


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("shard_bytes", [500, 1 << 30])
def test_a_document_in_parts_is_stored_as_a_whole_one(
    corpus, num_workers, shard_bytes, tmp_path, monkeypatch
):
    bpe = train_tokenizer(section("tokenizer", vocab_size=400), [LINE * 9])
    options = {"num_workers": num_workers, "shard_bytes": shard_bytes}
    parts = build_store(tmp_path / "parts", corpus, bpe, examples=Documents("text"), **options)
    monkeypatch.setattr(build, "InParts", Copies)
    whole = build_store(tmp_path / "whole", corpus, bpe, examples=Documents("text"), **options)
    assert parts.header == whole.header and len(parts) == 7
    files = {path.name: path.read_bytes() for path in parts.directory.iterdir()}
    assert files == {path.name: path.read_bytes() for path in whole.directory.iterdir()}
    assert bpe.decode(parts.tokens(1)) == LINE * 200
    np.testing.assert_array_equal(parts.num_bytes, whole.num_bytes)


def test_documents_come_in_pieces_to_tasks_that_take_them_and_whole_to_others(corpus, tmp_path):
    seen = []

    class Seen(Documents):
        def encode_part(self, record, tokenizer, first, last):
            seen.append(len(record["text"]))
            return super().encode_part(record, tokenizer, first, last)

    byte = section("tokenizer", kind="byte")
    build_store(tmp_path / "a", corpus, train_tokenizer(byte, []), examples=Seen("text"))
    assert max(seen) <= 1500 and len(seen) > 40
    copies = build_store(tmp_path / "b", corpus, train_tokenizer(byte, []), examples=Copies("text"))
    assert int(copies.lengths[1]) == 2 * len((LINE * 200).encode()) + 3


def test_a_failure_amid_a_long_document_leaves_nothing(corpus, tmp_path):
    with open(corpus[1].path, "ab") as file:
        file.write(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        build_store(tmp_path / "s", corpus, train_tokenizer(section("tokenizer", kind="byte"), []))
    assert not list(tmp_path.glob("s*"))


def test_a_corpus_that_moved_finds_its_store_and_another_text_of_the_same_size_does_not(
    tmp_path, monkeypatch
):
    def make(folder):
        files = list_sources([str(folder)])
        tokenizer = cached_tokenizer(tmp_path / "cache", section("tokenizer", vocab_size=320), files)
        return cached_store(tmp_path / "cache", files, tokenizer).directory

    (tmp_path / "a").mkdir()
    for name in ("x.txt", "y.txt"):
        (tmp_path / "a" / name).write_text(f"{name} " + LINE * 5)
        os.utime(tmp_path / "a" / name, ns=(10, 10))
    first = make(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b/x.txt")
    assert make(tmp_path / "b") == first
    (tmp_path / "b/x.txt").write_text("z.txt " + LINE * 5)
    os.utime(tmp_path / "b/x.txt", ns=(10, 10))
    assert make(tmp_path / "b") != first


PEAK = """
    import re, sys
    from llmjax.data.sources.cutting import Cutting
    from llmjax.data.sources.listing import list_sources
    from llmjax.data.store.build import build_store
    from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

    before = peak()
    build_store(sys.argv[2], list_sources([sys.argv[1]]), ByteTokenizer(), cutting=eval(sys.argv[3]))
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("cutting", ["Cutting()", "Cutting('nowhere', 0.1)"], ids=["whole", "cut"])
def test_memory_does_not_grow_with_the_length_of_a_document(cutting, tmp_path):
    peaks = []
    for megabytes in (10, 60):
        path, store = tmp_path / f"{megabytes}.txt", tmp_path / f"s{megabytes}"
        path.write_text(LINE * (megabytes * 1_000_000 // len(LINE.encode())))
        command = [sys.executable, "-c", textwrap.dedent(PEAK), str(path), str(store), cutting]
        environment = {**os.environ, "PYTHONPATH": str(Path(llmjax.__file__).parents[1])}
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks.append(int(result.stdout) / 1024)
    assert peaks[1] < peaks[0] + 20 and peaks[1] < 150


@pytest.mark.parametrize("num_workers", [1, 2])
def test_parts_of_cut_documents_are_stored_alike_however_they_were_read(
    corpus, num_workers, tmp_path, monkeypatch
):
    monkeypatch.setattr(cutting_module, "WINDOW", 200)
    bpe = train_tokenizer(section("tokenizer", vocab_size=400), [LINE * 9])
    cutting = Cutting(split_on="Call(?= me)", tail=0.3)
    parts = build_store(tmp_path / "parts", corpus, bpe, cutting=cutting, num_workers=num_workers)
    # The same in this process, from whole files and whole documents.
    monkeypatch.setattr(text_module, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(build, "PIECE_CHARS", 1 << 20)
    monkeypatch.setattr(cuts, "PIECE_CHARS", 1 << 20)
    together = build_store(tmp_path / "whole", corpus, bpe, cutting=cutting)
    assert parts.header == together.header and len(parts) == 2 * (1 + 200 + 3 + 400 + 2 + 100 + 1)
    files = {path.name: path.read_bytes() for path in parts.directory.iterdir()}
    assert files == {path.name: path.read_bytes() for path in together.directory.iterdir()}
