"""Sources: which files are found, under which names, and what every kind of bad input says."""

import builtins
import gzip
import json
import os
import tracemalloc

import pytest

from llmjax.data.sources.fingerprint import corpus_fingerprint
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.reading import Reading, ReadStats
from llmjax.data.sources.records import read_records
from llmjax.errors import UserError


def texts(source, stats=None, **options):
    files = list_sources([str(source)])
    return [d.text for f in files for d in read_records(f, Reading(**options), stats)]


def names(*sources):
    return [file.name for file in list_sources([str(s) for s in sources])]


def write_rows(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    for name in ("b.txt", "a.md", "deep/c.rst", "deep/d.py", "picture.png", ".hidden.txt", ".git/e.txt"):
        (root / name).write_text(name)
    write_rows(root / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    return root


def test_a_directory_gives_its_text_files_sorted_without_hidden_and_binary_ones(corpus):
    assert names(corpus) == ["a.md", "b.txt", "deep/c.rst", "deep/d.py", "rows.jsonl"]


def test_globs_are_recursive_and_named_from_their_fixed_part(corpus):
    assert names(corpus / "**" / "*.rst") == ["deep/c.rst"]
    assert names(corpus / "*.txt") == ["b.txt"]
    (corpus / "empty").mkdir()
    assert names(corpus / "*") == ["a.md", "b.txt", "deep/c.rst", "deep/d.py", "picture.png", "rows.jsonl"]


def test_a_file_named_twice_counts_once(corpus):
    assert len(list_sources([str(corpus), str(corpus / "a.md"), str(corpus / "**" / "*.md")])) == 5


def test_a_file_named_explicitly_is_text_whatever_its_suffix(corpus):
    assert texts(corpus / "picture.png") == ["picture.png"]


def test_a_path_with_glob_characters_that_exists_is_that_path(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_stdlib_is_the_source_files_without_tests():
    files = list_sources(["stdlib"])
    found = {file.name for file in files}
    assert {"json/decoder.py", "argparse.py", "unittest/mock.py"} <= found
    parts = {part for name in found for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert all(name.endswith(".py") for name in found)
    assert 400 < len(files) < 1000
    assert 8e6 < sum(file.size for file in files) < 2e7


def test_every_stdlib_file_is_readable():
    stats = ReadStats()
    count = sum(1 for f in list_sources(["stdlib"]) for _ in read_records(f, stats=stats))
    assert count == stats.documents > 400
    assert stats.skipped == stats.replaced == 0


def test_text_is_used_as_it_is_but_for_a_byte_order_mark(tmp_path):
    text = "  a\r\nb\rc\n\n\u2028\u0085\ufeff\u0000 中文 "
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert texts(tmp_path / "a.txt") == [text]


def test_rows_are_named_by_line_and_blank_lines_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x\\r\\ny"}\n\n  \n{"text": "\\u4f60\xe5\xa5\xbd", "n": 1}')
    documents = list(read_records(list_sources([str(path)])[0]))
    assert [(d.name, d.text) for d in documents] == [("a.jsonl#1", "x\r\ny"), ("a.jsonl#4", "你好")]


def test_compressed_files_read_like_plain_ones(tmp_path):
    rows = [{"body": "α"}, {"body": "β"}]
    write_rows(tmp_path / "a.jsonl.gz", rows, gzip.open)
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write("γ\r\n".encode())
    assert names(tmp_path) == ["a.jsonl.gz", "b.txt.gz"]
    assert texts(tmp_path, fields=("body",)) == ["α", "β", "γ\r\n"]


def test_zstandard_files_of_several_frames_read_like_plain_ones(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in "xyz"]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts(tmp_path) == ["x", "y", "z"]
    (tmp_path / "a.jsonl.zst").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst.*cannot be read"):
        texts(tmp_path)


def test_parquet_rows_are_documents(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    rows = [f"{i} 中" for i in range(1000)]
    columns = {"id": list(range(1000)), "text": rows}
    parquet.write_table(table(columns), tmp_path / "a.parquet", row_group_size=300)
    stats = ReadStats()
    documents = list(read_records(list_sources([str(tmp_path)])[0], stats=stats))
    assert [d.text for d in documents] == rows
    assert documents[-1].name == "a.parquet#1000"
    assert stats.bytes_read == (tmp_path / "a.parquet").stat().st_size
    with pytest.raises(UserError, match=r"data.text_field = 'body'.*id, text"):
        texts(tmp_path, fields=("body",))
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="no Parquet file"):
        texts(tmp_path)


def test_messages_in_parquet_are_those_of_json(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    talks = [[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}], None, []]
    for name, column in (("objects", talks), ("texts", [["a", "b"], ["c"], []])):
        parquet.write_table(pa.table({"text": pa.array(column)}), tmp_path / f"{name}.parquet")
        read = texts(tmp_path / f"{name}.parquet", structured=("text",), on_bad_text="skip")
        assert [json.loads(text) for text in read] == [one for one in column if one is not None]


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    real = builtins.__import__

    def without(module, *args, **options):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"{package}: run pip install 'llmjax\[data\]'"):
        texts(tmp_path)


def test_text_that_is_not_utf8_is_an_error_with_file_and_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xffc")
    with pytest.raises(UserError, match=r"on_bad_text.*a\.txt' is not UTF-8 at byte 5:"):
        texts(tmp_path)


def test_rows_that_are_not_utf8_are_an_error_with_line_and_offset(tmp_path):
    first = b'{"text": "ok"}\n'
    (tmp_path / "a.jsonl").write_bytes(first + b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:2 is not UTF-8 at byte {len(first) + 10}:"):
        texts(tmp_path)


def test_bad_text_is_skipped_or_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\xff"}\n{"text": "y\\ud800"}\n{"text": "z"}\n')
    stats = ReadStats()
    assert texts(tmp_path, on_bad_text="skip", stats=stats) == ["z"]
    assert (stats.skipped, stats.replaced, stats.documents) == (3, 0, 1)
    stats = ReadStats()
    assert texts(tmp_path, on_bad_text="replace", stats=stats) == ["ab\ufffdc", "x\ufffd", "y\ufffd", "z"]
    assert (stats.skipped, stats.replaced, stats.documents) == (0, 3, 4)


def test_half_a_surrogate_pair_in_json_is_bad_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "ab\\ud800"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2 has a lone surrogate at character 2"):
        texts(tmp_path)


def test_python_files_are_read_in_their_declared_encoding(tmp_path):
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    assert texts(tmp_path) == ["# -*- coding: latin-1 -*-\nx = 'é'\n"]
    (tmp_path / "a.py").write_bytes(b"x = '\xe9'\n")
    with pytest.raises(UserError, match="byte 5"):
        texts(tmp_path)


def test_empty_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("")
    write_rows(tmp_path / "b.jsonl", [{"text": ""}, {"text": " "}])
    stats = ReadStats()
    assert texts(tmp_path, stats=stats) == [" "]
    assert stats.empty == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{oops", r"a\.jsonl:2 is not JSON"),
        ('["text"]', r"a\.jsonl:2 is no JSON object but a list"),
        ('{"body": "x", "id": 1}', r"'text' is missing in .*a\.jsonl:2, which has the fields body, id"),
        ('{"text": 5}', r"data\.text_field = 'text' is a int in .*a\.jsonl:2, not a string"),
    ],
)
def test_a_bad_row_is_named_in_one_sentence(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=message) as error:
        texts(tmp_path)
    assert "\n" not in str(error.value)


def test_sources_that_hold_nothing_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in [
        ("absent.txt", "does not exist"),
        ("*.txt", "matches no file"),
        ("empty", "directory without text"),
    ]:
        with pytest.raises(UserError, match=message):
            list_sources([str(tmp_path / source)])
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        list_sources([])
    with pytest.raises(UserError, match="list of sources"):
        list_sources("stdlib")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"data\.on_bad_text='ignore' is not known; use one of error, skip, replace"
    ):
        texts(tmp_path / "a.txt", on_bad_text="ignore")


def test_a_truncated_gzip_file_is_an_error(tmp_path):
    data = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz.*cannot be read"):
        texts(tmp_path)


def test_rows_stream_and_progress_counts_bytes_on_disk(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 20_000)
    stats = ReadStats()
    tracemalloc.start()
    documents = read_records(list_sources([str(path)])[0], stats=stats)
    next(documents)
    assert 0 < stats.bytes_read < path.stat().st_size / 4
    for _ in documents:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4
    assert stats.bytes_read == path.stat().st_size


def test_the_fingerprint_changes_with_names_and_content_only(corpus):
    before = corpus_fingerprint(list_sources([str(corpus)]))
    assert corpus_fingerprint(list_sources([str(corpus)])) == before
    moved = corpus.rename(corpus.with_name("moved"))
    assert corpus_fingerprint(list_sources([str(moved)])) == before
    os.utime(moved / "a.md", ns=(0, 0))
    assert corpus_fingerprint(list_sources([str(moved)])) == before
    (moved / "a.md").write_text("longer than it was")
    assert corpus_fingerprint(list_sources([str(moved)])) != before
