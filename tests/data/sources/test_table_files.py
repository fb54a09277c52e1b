"""Tables: commas and tabs, quotes, headers, encodings, compression, and what every kind of bad row says."""

import csv
import gzip
import io

import pytest

from llmjax.data.sources.listing import list_sources, search_sources
from llmjax.data.sources.reading import Reading, ReadStats
from llmjax.data.sources.records import has_text, read_records
from llmjax.errors import UserError

CELLS = ['say "hi"', "石,云", " two\nlines\r\n", "", "it's \\ 1;2", '"']


def read(path, stats=None, **options):
    return [r for f in list_sources([str(path)]) for r in read_records(f, Reading(**options), stats)]


def as_csv(rows, **options):
    out = io.StringIO(newline="")
    csv.writer(out, **options).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_cells_of_any_encoding_are_read_as_they_were_written(end, encoding, compress, tmp_path):
    rows = [["label", "text"], *(["a,b", cell] for cell in CELLS)]
    (tmp_path / "a.csv").write_bytes(compress(as_csv(rows, lineterminator=end).encode(encoding)))
    stats = ReadStats()
    options = {"fields": ("text", "label"), "encoding": encoding.removesuffix("-sig")}
    found = read(tmp_path, stats, **options)
    assert [record.fields for record in found] == [{"text": cell, "label": "a,b"} for cell in CELLS if cell]
    assert stats.empty == 1


def test_tabs_separate_and_quotes_are_characters_in_tsv(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"ham\t\"one\r\n\nspam\ttwo\" , 3\nham\t'x'"))
    found = read(tmp_path, columns=("label", "text"), fields=("text", "label"))
    assert [tuple(r.fields.values()) for r in found] == [
        ('"one', "ham"),
        ('two" , 3', "spam"),
        ("'x'", "ham"),
    ]
    assert [record.name for record in found] == [f"a.tsv.gz#{line}" for line in (1, 3, 4)]


def test_documents_are_named_by_the_line_where_their_row_begins(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"a\nb",1\n\nc,2\n')
    assert [record.name for record in read(tmp_path)] == ["a.csv#2", "a.csv#5"]


def test_a_cell_may_be_a_long_document(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{"long " * 100_000}"\n')
    assert len(read(tmp_path)[0].text) == 500_000


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.csv", b"text,n\na,1\nb\n", r"line .*a\.csv:3 has 1 cell for 2 columns \(text, n\)"),
        ("a.tsv", b"text\tn\na\t1\nb\t1\t2\n", r"line .*a\.tsv:3 has 3 cells for 2 columns"),
        ("a.csv", b'text,n\na,1\n"b\nc,1\n', r"line .*a\.csv:3 is broken \(unexpected end of data\)"),
        ("a.csv", b'text,n\n"b"c,1\na,1\n', r"line .*a\.csv:2 is broken \(.* expected after"),
        ("a.csv", b"text,n\na,1\nb\xff,2\n", r"line .*a\.csv:3 is not UTF-8 at byte 12"),
    ],
)
def test_a_bad_row_is_an_error_with_file_and_line_or_left_out_and_counted(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"data\.on_bad_text = 'error' and .*{message}.* set skip"):
        read(tmp_path)
    stats = ReadStats()
    assert [record.text for record in read(tmp_path, stats, on_bad_text="skip")] == ["a"]
    assert stats.skipped == 1


def test_bad_bytes_are_replaced_and_counted(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,n\nb\xff,2\n")
    stats = ReadStats()
    assert [record.text for record in read(tmp_path, stats, on_bad_text="replace")] == ["b\ufffd"]
    assert (stats.replaced, stats.skipped) == (1, 0)


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "a.csv",
            b"label,body\nham,x\n",
            "data.text_field = 'text' is not a column of .*, which has label, body",
        ),
        ("a.csv", b"text,text\nham,x\n", "'text' is the name of several columns"),
        ("a.csv", b"\n", "a table that is empty"),
        ("a.csv", b'"text\nx', "a table that begins with a broken row"),
        ("a.tsv", b"text\tn\xff\na\t1\n", "names of columns that are not UTF-8"),
    ],
)
def test_columns_that_cannot_be_used_are_an_error(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_table_in_a_folder_that_has_no_text_is_left_out_and_counted(tmp_path):
    (tmp_path / "prices.csv").write_text("item,price\nx,1\n")
    (tmp_path / "texts.tsv.gz").write_bytes(gzip.compress(b"n\ttext\n1\tx\n"))
    listing = search_sources([str(tmp_path)], has_text=has_text)
    assert [file.name for file in listing.files] == ["texts.tsv.gz"]
    assert listing.left_out == {"tables without a column for the text": 1}
