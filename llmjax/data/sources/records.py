"""The documents of a file, whatever its format.

`read_parts` streams one file: a row of JSON or Parquet is a document, and a file of plain text is one, which comes in
parts where it is long, so that no more than a part is held. `read_records` puts the parts together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llmjax.data.sources.encoding import open_text
from llmjax.data.sources.formats import (
    JSON_SUFFIXES,
    LINE_SUFFIXES,
    PARQUET_SUFFIX,
    TEXT_SUFFIXES,
    suffix_of,
)
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.parquet import read_parquet
from llmjax.data.sources.reading import Parts, Reading, ReadStats
from llmjax.data.sources.rows import has_field, read_rows
from llmjax.data.sources.text import read_text
from llmjax.errors import UserError

# Format -> what reads it.
READERS: dict[str, Callable[[SourceFile, Reading, ReadStats], Parts]] = {
    "parquet": read_parquet,
    "rows": read_rows,
    "text": read_text,
}
_READING = Reading()


@dataclasses.dataclass(frozen=True)
class Record:
    """One document, with the fields of it that were asked for.

    name    where the document comes from, such as `poems.jsonl#17`
    fields  field name -> a string that is valid Unicode, or an integer; the first field is text and not empty
    """

    name: str
    fields: dict[str, str | int]

    @property
    def text(self) -> str:
        """The first field."""
        text = next(iter(self.fields.values()))
        assert isinstance(text, str)
        return text


class RecordPart(NamedTuple):
    """A record, or a part of a long one; `first` and `last` say whether the document begins and ends with it."""

    record: Record
    first: bool
    last: bool


def read_parts(
    file: SourceFile, reading: Reading = _READING, stats: ReadStats | None = None
) -> Iterator[RecordPart]:
    """Streams the documents of one file, in its order. Empty ones are left out and counted in `stats`."""
    stats = ReadStats() if stats is None else stats
    before = stats.bytes_read
    for name, values, first, last in _reader(file, reading)(file, reading, stats):
        if values is None:
            stats.skipped += 1
        elif first and last and not values[0]:
            stats.empty += 1
        else:
            stats.documents += last
            yield RecordPart(Record(name, dict(zip(reading.fields, values))), first, last)
    stats.bytes_read = before + file.size


def read_records(
    file: SourceFile, reading: Reading = _READING, stats: ReadStats | None = None
) -> Iterator[Record]:
    """Streams the documents of one file, each whole."""
    held: list[str] = []
    for part in read_parts(file, reading, stats):
        if part.first and part.last:
            yield part.record
            continue
        held.append(part.record.text)
        if part.last:
            yield Record(part.record.name, {reading.fields[0]: "".join(held)})
            held = []


def read_texts(file: SourceFile, reading: Reading = _READING) -> Iterator[Iterator[str]]:
    """The text of each document in chunks, which are to be read before the next document is."""
    parts = read_parts(file, reading)
    for part in parts:
        yield chunks_of(part, parts)


def chunks_of(part: RecordPart, parts: Iterator[RecordPart]) -> Iterator[str]:
    """The text of the document that begins with `part`, in chunks; the rest of them is taken from `parts`."""
    yield part.record.text
    while not part.last:
        part = next(parts)
        yield part.record.text


def _reader(file: SourceFile, reading: Reading) -> Callable[[SourceFile, Reading, ReadStats], Parts]:
    name = detect_format(file, reading)
    if name not in READERS:
        raise ValueError(f"{name!r} is a format without a reader; there are {', '.join(READERS)}")
    return READERS[name]


def detect_format(file: SourceFile, reading: Reading = _READING) -> str:
    """The format of a file: by its suffix, and where that is not known by its content."""
    suffix = suffix_of(file.path)
    if suffix == PARQUET_SUFFIX:
        return "parquet"
    if suffix in (*LINE_SUFFIXES, *JSON_SUFFIXES):
        return "rows"
    if suffix in TEXT_SUFFIXES:
        return "text"
    with open(file.path, "rb") as stream:
        if stream.read(4) == b"PAR1":
            return "parquet"
    # A row of JSON without the text field is text like any other.
    with (
        contextlib.suppress(UserError, ValueError, RecursionError),
        open_text(file, reading, ReadStats()) as text,
    ):
        line = text.readline(1 << 20)
        row = json.loads(line) if line.startswith(b"{") else None
        if isinstance(row, dict) and reading.fields[0] in row:
            return "rows"
    return "text"


def has_text(path: str, reading: Reading = _READING) -> bool:
    """Whether the file of JSON at `path` is a corpus: its first object has the text field."""
    return has_field(SourceFile(path, path, 1, ""), reading)
