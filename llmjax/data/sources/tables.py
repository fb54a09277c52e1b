"""Reads tables. Each row is a document, and the fields of a document are the cells of its row.

There are two kinds. In a `.csv` file, commas separate the cells (RFC 4180): a cell within double quotes may contain
commas, line ends, and quotes that are doubled. In a `.tsv` file, tabs separate the cells, a row is a line, and quotes
are characters like any other. The first line has the names of the columns, unless `Reading.columns` gives them.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
from collections.abc import Iterable, Iterator, Sequence

from llmjax.data.sources.encoding import decode, open_text
from llmjax.data.sources.formats import TAB_SUFFIXES, suffix_of
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Part, Parts, Reading, ReadStats, name_of_field
from llmjax.errors import UserError, reason_of
from llmjax.names import plain_name

# The most characters of a cell of a .csv file. Python's module csv refuses cells of more than 131,072 characters unless
# it is told otherwise, but a cell may be a long document. This is the largest limit that it accepts on every system.
csv.field_size_limit(2**31 - 1)
# How bytes that are not UTF-8 are decoded so that `encode` gives them back.
_ESCAPE = "surrogateescape"
# The number of the line where a row begins, its cells with `_ESCAPE`, its bytes, and where they begin in the file. An
# error stands in place of the cells if the row does not follow the rules of its format.
Row = tuple[int, "Sequence[str] | csv.Error", bytes, int]


def read_table(file: SourceFile, reading: Reading, stats: ReadStats) -> Parts:
    """The documents of a table, named by the line where their row begins: `file.csv#17`.

    Raises `UserError` if a column that `reading.fields` names is missing. A row with a wrong number of cells, with
    quotes that do not match, or with text that cannot be read is an error if `reading.on_bad_text` is `error`. With
    `skip` it is left out. With `replace`, so is a row whose cells cannot be told apart, and other text gets U+FFFD in
    place of bytes that cannot be read.
    """
    with open_text(file, reading, stats) as stream:
        rows = _rows(stream, file)
        columns = reading.columns or _header(rows, file)
        places = [_place(columns, i, field, file) for i, field in enumerate(reading.fields)]
        for number, cells, data, offset in rows:
            at = f"line {plain_name(f'{file.path}:{number}')}"
            values = None
            whole = _whole(cells, columns, reading, at)
            # The error for bytes that are not UTF-8 names their place in the file, so the whole row is decoded.
            if whole is not None and decode(data, file, reading, stats, at, offset) is not None:
                values = tuple(_mended(whole[place]) for place in places)
            yield Part(f"{file.name}#{number}", values)


def has_column(file: SourceFile, reading: Reading) -> bool:
    """Whether a table has a column for the text.

    True if the file cannot be read, so that the attempt to read it as a corpus says what is wrong.
    """
    if reading.columns:
        return True
    with contextlib.suppress(UserError), open_text(file, reading, ReadStats()) as stream:
        return reading.fields[0] in _header(_rows(stream, file), file)
    return True


def _rows(stream: Iterable[bytes], file: SourceFile) -> Iterator[Row]:
    """The rows of a table that are not blank, the header among them."""
    return _by_tabs(stream) if suffix_of(file.path) in TAB_SUFFIXES else _by_commas(stream)


def _by_tabs(stream: Iterable[bytes]) -> Iterator[Row]:
    for number, line, offset in _lines(stream):
        text = line.decode(errors=_ESCAPE).rstrip("\r\n")
        if text:
            yield number, text.split("\t"), line, offset


def _by_commas(stream: Iterable[bytes]) -> Iterator[Row]:
    # The lines of the row that is being read.
    held: list[tuple[int, bytes, int]] = []

    def texts() -> Iterator[str]:
        for one in _lines(stream):
            held.append(one)
            yield one[1].decode(errors=_ESCAPE)

    # `strict` makes an error of quotes that do not match, in place of a guess.
    reader = csv.reader(texts(), strict=True)
    while True:
        held.clear()
        cells: list[str] | csv.Error
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = error
        if cells != []:
            number, _, offset = held[0]
            yield number, cells, b"".join(line for _, line, _ in held), offset


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, bytes, offset in the file in bytes) of each line. A byte order mark is left out."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        yield number, data, offset + len(line) - len(data)
        offset += len(line)


def _header(rows: Iterator[Row], file: SourceFile) -> tuple[str, ...]:
    """The names of the columns in the first row of a table. Raises `UserError` if there are none."""
    nothing: Row = (0, (), b"", 0)
    _, cells, data, _ = next(rows, nothing)
    try:
        data.decode()
        if isinstance(cells, csv.Error):
            problem = f"begins with a broken row ({reason_of(cells)})"
        elif cells:
            return tuple(cells)
        else:
            problem = "is empty"
    except UnicodeDecodeError as error:
        problem = f"has names of columns that are not UTF-8 ({reason_of(error)})"
    raise UserError(
        f"data.sources names {file.path!r}, a table that {problem}: correct the file, set data.encoding, or name the "
        "columns in data.columns."
    )


def _place(columns: Sequence[str], i: int, field: str, file: SourceFile) -> int:
    """The number of the column that has the field number `i`. Raises `UserError` unless there is exactly one."""
    if field not in columns:
        names = plain_name(", ".join(columns))
        raise UserError(
            f"{name_of_field(i)} = {field!r} is not a column of {file.path!r}, which has {names}: name one of these, "
            "or set data.columns if the table has no line with the names of its columns."
        )
    if columns.count(field) > 1:
        raise UserError(
            f"{name_of_field(i)} = {field!r} is the name of several columns of {file.path!r}: give each its own name."
        )
    return columns.index(field)


def _whole(
    cells: Sequence[str] | csv.Error, columns: Sequence[str], reading: Reading, at: str
) -> Sequence[str] | None:
    """The cells of a row if it has one for each column. If not, None, or `UserError` if `reading.on_bad_text` is
    `error`."""
    if not isinstance(cells, csv.Error) and len(cells) == len(columns):
        return cells
    if reading.on_bad_text != "error":
        return None
    if isinstance(cells, csv.Error):
        raise UserError(
            f"data.on_bad_text = 'error' and the row that begins in {at} is broken ({reason_of(cells)}): put cells "
            "with quotes into quotes, double the quotes within, or set skip."
        )
    raise UserError(
        f"data.on_bad_text = 'error' and {at} has {len(cells)} {'cell' if len(cells) == 1 else 'cells'} for "
        f"{len(columns)} columns ({plain_name(', '.join(columns))}): correct the row, or set skip."
    )


def _mended(cell: str) -> str:
    """The text of a cell, with U+FFFD in place of bytes that are not UTF-8."""
    return cell if cell.isascii() else cell.encode(errors=_ESCAPE).decode(errors="replace")
