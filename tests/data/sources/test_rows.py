"""JSON and Parquet as the world writes them: lines, arrays, objects, lists of lines, nulls, nesting, types."""

import gzip
import json
import tracemalloc

import pytest

from llmjax.data.sources import rows as rows_module
from llmjax.data.sources.listing import list_sources, search_sources
from llmjax.data.sources.reading import Reading, ReadStats
from llmjax.data.sources.records import has_text, read_records
from llmjax.errors import UserError

POEMS = [
    {"title": "一", "text": "春眠不觉晓，\n[处处]闻啼鸟。"},
    {"title": "二", "text": 'a "b" {c} \\ d, e'},
]


def texts(path, stats=None, **options):
    return [r.text for f in list_sources([str(path)]) for r in read_records(f, Reading(**options), stats)]


LAYOUTS = {
    "lines": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "array": lambda rows: json.dumps(rows, ensure_ascii=False),
    "array over lines": lambda rows: "\n " + json.dumps(rows, indent=2),
    "objects over lines": lambda rows: "\n\n".join(json.dumps(row, indent=1) for row in rows),
    "array a line an object": lambda rows: "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n",
}


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_every_layout_of_json_is_read_by_its_content(layout, name, encoding, tmp_path):
    if name == "a.jsonl" and layout == "objects over lines":
        return
    data = LAYOUTS[layout](POEMS).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    encoding = encoding.removesuffix("-sig")
    assert texts(tmp_path / name, encoding=encoding) == [poem["text"] for poem in POEMS]
    assert texts(tmp_path / name, encoding=encoding, fields=("title",)) == ["一", "二"]
    assert texts(tmp_path, encoding=encoding) == [poem["text"] for poem in POEMS]


@pytest.mark.parametrize("row", [POEMS[0]])
def test_a_single_object_is_a_document(row, tmp_path):
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
        assert texts(tmp_path / "a.json") == [row["text"]]


def test_lines_of_json_in_a_file_of_unknown_suffix_are_rows_and_text_stays_text(tmp_path):
    lines = LAYOUTS["lines"](POEMS)
    for name in ("part-00000", "shard.v1"):
        (tmp_path / name).write_text(lines)
        assert len(texts(tmp_path / name)) == 2
    (tmp_path / "a.md").write_text(lines)
    assert texts(tmp_path / "a.md") == [lines]
    assert texts(tmp_path / "part-00000", fields=("body",)) == [lines]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_layout_of_json_is_read_under_an_unknown_suffix(layout, encoding, tmp_path):
    path = tmp_path / "part-00000"
    path.write_bytes(LAYOUTS[layout](POEMS).encode(encoding))
    assert texts(path) == [poem["text"] for poem in POEMS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_first_row_under_an_unknown_suffix_is_a_row(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_HEAD", 1000)
    rows = [{"title": "一", "text": "long " * 1000}, *POEMS]
    (tmp_path / "part-0").write_text(LAYOUTS[layout](rows))
    assert texts(tmp_path / "part-0") == [row["text"] for row in rows]
    for text in ("[note] " + "text: " * 900, '{"other": 1} ' + "long " * 900):
        (tmp_path / "part-0").write_text(text)
        assert texts(tmp_path / "part-0") == [text]


@pytest.mark.parametrize(
    "text", ["[Illustration] a tale", "[1] a note, [2] another", "{", "[", '["text"]', '{"a": 1}']
)
def test_text_that_begins_with_a_bracket_stays_text_under_an_unknown_suffix(text, tmp_path):
    (tmp_path / "book.v1").write_text(text)
    assert texts(tmp_path / "book.v1") == [text]


def test_json_in_a_folder_that_has_no_text_is_left_out_and_counted(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(LAYOUTS["lines"](POEMS).encode()))
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text('[{"text": "x"')
    listing = search_sources([str(tmp_path)], has_text=has_text)
    assert [file.name for file in listing.files] == ["broken.json", "c4.json.gz"]
    assert listing.left_out == {"JSON without the text field": 2}
    with pytest.raises(UserError, match="'text' is missing in .*package.json"):
        texts(tmp_path / "package.json")


def test_a_text_that_is_a_list_of_strings_is_joined_by_line_ends(tmp_path):
    rows = [{"paragraphs": ["a", "b", "", "c"]}, {"paragraphs": []}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    stats = ReadStats()
    assert texts(tmp_path, stats, fields=("paragraphs",)) == ["a\nb\n\nc"]
    assert stats.empty == 1
    (tmp_path / "a.json").write_text('[{"text": ["a", 1]}]')
    with pytest.raises(UserError, match=r"'text' is a list in object 1 of .*a\.json"):
        texts(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_null_is_an_error_or_left_out_and_counted(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        write_parquet(path, pyarrow.array([None, "x", None]))
    else:
        path.write_text('{"text": null}\n{"text": "x"}\n{"text": null}')
    with pytest.raises(
        UserError, match=r"data\.on_bad_text = 'error' and data\.text_field = 'text' is null in .*set skip"
    ):
        texts(path)
    for choice in ("skip", "replace"):
        stats = ReadStats()
        assert texts(path, stats, on_bad_text=choice) == ["x"]
        assert (stats.skipped, stats.replaced) == (2, 0)


@pytest.mark.parametrize("null", ["null", '{"text": null}', '{"text": ["a", null]}'])
@pytest.mark.parametrize("layout", ["%s\n{}\n", "[%s, {}]"])
def test_a_null_row_and_a_null_line_are_null_text(null, layout, tmp_path):
    (tmp_path / "a.json").write_text((layout % null).replace("{}", '{"text": "x"}'))
    with pytest.raises(UserError, match=r"data\.on_bad_text = 'error' .* is null in .*set skip"):
        texts(tmp_path / "a.json")
    for choice in ("skip", "replace"):
        stats = ReadStats()
        assert texts(tmp_path, stats, on_bad_text=choice) == ["x"]
        assert stats.skipped == 1


@pytest.mark.parametrize(
    "other", ["[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000, "9" * 5000, "[-" + "7" * 5000 + "]"]
)
@pytest.mark.parametrize("layout", ["%s\n", "[%s]"])
def test_another_field_that_python_cannot_read_at_once_does_no_harm(other, layout, tmp_path):
    row = f'{{"other": {other}, "text": "x\\n[\\"", "more": {other}}}'
    (tmp_path / "a.json").write_text(layout % row)
    assert texts(tmp_path) == ['x\n["']


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"text": "a"}, {"text": "b"', r"object 2 of .*a\.json.*is cut short"),
        ('[{"text": "a"}, {"text": "b', r"object 2 of .*a\.json.*is cut short"),
        ('[{"text": "a"},\n', r"object 2 of .*a\.json.*is cut short: repair"),
        ('[{"text": "a"}', r"object 1 of .*a\.json.*is cut short"),
        ("[", r"object 1 of .*a\.json.*is cut short"),
        ('[{"text": "a"}]]', r"object 2 of .*a\.json.*no JSON object"),
        ('[{"text": "a"}] and more', r"object 2 of .*a\.json.*no JSON object"),
        ('[{"text": "a"}, {"text" "b"}]', r"object 2 of .*a\.json' is not JSON"),
        ('["a"]', r"object 1 of .*a\.json' is no JSON object but a str"),
        ('[{"text": 5}]', r"'text' is a int in object 1 of"),
        ('{\n"text": "a"', r"object 1 of .*is cut short"),
        ("[" * 3000, r"object 1 of .*is cut short"),
    ],
)
def test_json_that_is_none_is_named_by_object_in_one_sentence(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        texts(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_bad_text_in_an_array_is_of_one_object(tmp_path):
    data = b'[{"text": "good"}, {"text": "x\xff"}, {"text": "\\ud800"}]'
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=rf"object 2 of .*a\.json' is not UTF-8 at byte {data.index(0xFF)}:"):
        texts(tmp_path)
    assert texts(tmp_path, on_bad_text="skip") == ["good"]
    assert texts(tmp_path, on_bad_text="replace") == ["good", "x\ufffd", "\ufffd"]
    (tmp_path / "a.json").write_bytes(b'[{"text": "ab\\ud800"}]')
    with pytest.raises(UserError, match=r"object 1 of .*a\.json' has a lone surrogate at character 2"):
        texts(tmp_path)


def test_an_array_streams(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 2000}] * 5000))
    tracemalloc.start()
    assert sum(1 for _ in read_records(list_sources([str(path)])[0])) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


def test_objects_are_told_apart_wherever_blocks_end(tmp_path, monkeypatch):
    from llmjax.data.sources import rows

    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + LAYOUTS["array over lines"](POEMS).encode())
    for size in range(1, 40):
        monkeypatch.setattr(rows, "_BLOCK", size)
        with open(path, "rb") as stream:
            found = [json.loads(data) for _, data, _ in rows._objects(stream, list_sources([str(path)])[0])]
        assert found == POEMS


def write_parquet(path, column, **options):
    from pyarrow import parquet, table

    parquet.write_table(table({"text": column}), path, **options)


def text_columns():
    import pyarrow as pa

    words = ["a", "中文", "", "d"]
    yield from (pa.array(words, kind) for kind in (pa.string(), pa.large_string(), pa.binary()))
    yield pa.array(words).dictionary_encode()
    if hasattr(pa, "string_view"):
        yield pa.array(words, pa.string_view())
    yield from (
        pa.array([[word] for word in words], kind)
        for kind in (pa.list_(pa.string()), pa.large_list(pa.string()))
    )
    yield pa.array([["a"], ["中文"], [""], ["d"]], pa.list_(pa.string(), 1))


def test_every_parquet_column_of_text_is_read(tmp_path):
    pytest.importorskip("pyarrow")
    for column in text_columns():
        write_parquet(tmp_path / "a.parquet", column, row_group_size=2)
        assert texts(tmp_path) == ["a", "中文", "d"], column.type
    import pyarrow as pa

    write_parquet(tmp_path / "a.parquet", pa.array([["a", "b"], [], ["c"]]))
    assert texts(tmp_path) == ["a\nb", "c"]


def test_a_parquet_column_that_is_no_text_is_one_sentence(tmp_path):
    pa = pytest.importorskip("pyarrow")
    for column in (
        pa.array([1, 2]), pa.array([1.5]), pa.array([True]), pa.array([{"a": "x"}]), pa.array([[1]]), pa.nulls(2),
        pa.array([0], pa.timestamp("us")), pa.array([[["x"]]]),
        pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())),
    ):  # fmt: skip
        write_parquet(tmp_path / "a.parquet", column)
        with pytest.raises(
            UserError, match=r"data\.text_field = 'text' is a column of .* in .*a\.parquet', not of text"
        ) as error:
            texts(tmp_path)
        assert "\n" not in str(error.value)


def test_a_damaged_parquet_file_is_one_sentence_wherever_it_is_damaged(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    write_parquet(path, pa.array([f"row {i} of many" * 3 for i in range(500)]), write_page_checksum=True)
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), max(len(whole) // 60, 1)):
        path.write_bytes(whole[:at] + bytes(b ^ 0x55 for b in whole[at : at + 8]) + whole[at + 8 :])
        try:
            texts(path)
        except UserError as error:
            refused += 1
            assert "a.parquet" in str(error) and "\n" not in str(error)
    assert refused > 30
    for cut in (0, 3, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.parquet"):
            texts(path)


def test_parquet_with_two_columns_of_the_name_or_compressed_as_a_whole_is_one_sentence(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"'text' is the name of several columns of .*a\.parquet"):
        texts(path)
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"b\.parquet\.gz', which is a compressed Parquet file: unpack it"):
        texts(tmp_path / "b.parquet.gz")


def test_bad_text_in_parquet_is_not_advised_to_name_an_encoding(tmp_path):
    pa = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", pa.array(["道可道，非常道。".encode("gb18030")] * 99, pa.binary()))
    with pytest.raises(
        UserError, match=r"row 1 of .* is not UTF-8 at byte 0: correct it, or set skip or replace"
    ):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "part-0", "a.py"])
def test_a_file_that_is_gone_after_it_was_listed_is_one_sentence(name, tmp_path):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text("x")
    (file,) = list_sources([str(tmp_path / name)])
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"data\.sources names .*{name}', which "):
        list(read_records(file))


def test_parquet_without_its_suffix_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "part-0", pa.array(["x"]))
    assert texts(tmp_path / "part-0") == ["x"]


@pytest.mark.parametrize("suffix", [".txt", ".text", ".txt.gz"])
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_rows_of_json_in_a_text_file_are_rows(suffix, layout, tmp_path):
    rows = [json.dumps({"text": f"row {i}"}) for i in range(3)]
    data = ("\n".join(rows) if layout == "lines" else f"[{','.join(rows)}]").encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    (file,) = search_sources([str(tmp_path)]).files
    assert [record.text for record in read_records(file)] == ["row 0", "row 1", "row 2"]
