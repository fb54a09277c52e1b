"""Reads the documents of a file, whatever its format.

`read_parts` streams one file. A row of JSON, Parquet or a table is a document, and so is a whole file of plain text. A
long document comes in parts, so that no more than one part is in memory. `read_records` puts the parts together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from llmjax.data.sources.encoding import open_text
from llmjax.data.sources.formats import PARQUET_MAGIC, VAGUE_SUFFIXES, format_of, suffix_of, uncompressed_name
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.parquet import read_parquet
from llmjax.data.sources.reading import Parts, Reading, ReadStats
from llmjax.data.sources.rows import begins_with_row, has_field, read_rows
from llmjax.data.sources.tables import has_column, read_table
from llmjax.data.sources.text import read_text
from llmjax.errors import UserError

# Format, a key of `formats.SUFFIXES` -> the function that reads it.
READERS: dict[str, Callable[[SourceFile, Reading, ReadStats], Parts]] = {
    "parquet": read_parquet,
    "rows": read_rows,
    "table": read_table,
    "text": read_text,
}
# Fields that every document has, whatever its format: the name of its file without suffixes, and the name of the folder
# of the file. No reader is asked for them, see `places_of`.
FILE, FOLDER = "<file>", "<folder>"
# How files are read if a caller does not say: UTF-8, the field "text", an error for text that cannot be read.
_READING = Reading()


@dataclasses.dataclass(frozen=True)
class Record:
    """One document, with the fields that `Reading.fields` asks for.

    name    where the document comes from, such as `poems.jsonl#17`
    fields  field name -> a string of valid Unicode, or an integer. The first field is the text, which is not empty
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
    """A record, or a part of a long one.

    record    the part, with the name of the document
    first     whether the document begins with this part
    last      whether the document ends with this part
    held_out  whether the document is marked as held out (`data/sources/cutting.py`)
    """

    record: Record
    first: bool
    last: bool
    held_out: bool = False


def read_parts(
    file: SourceFile, reading: Reading = _READING, stats: ReadStats | None = None
) -> Iterator[RecordPart]:
    """Streams the documents of one file in the order of the file, long ones in parts.

    Documents that are empty or cannot be read are left out and counted in `stats`, which `bytes_read` shows the
    progress of. Raises `UserError` if the file cannot be read, or has text that cannot be read while
    `reading.on_bad_text` is `error`.
    """
    stats = ReadStats() if stats is None else stats
    before = stats.bytes_read
    for name, values, first, last in _reader(file, reading)(file, reading, stats):
        if values is None:
            stats.skipped += 1
        elif first and last and _is_empty(values, reading):
            stats.empty += 1
        else:
            stats.documents += last
            yield RecordPart(Record(name, dict(zip(reading.fields, values))), first, last)
    # A reader may stop short of the last bytes, as of a footer, or count in steps.
    stats.bytes_read = before + file.size


def _is_empty(values: Sequence[str | int], reading: Reading) -> bool:
    """Whether the text of a document is empty, or a further text that belongs to it has nothing but white space."""
    further = (value for field, value in zip(reading.fields, values) if field in reading.texts)
    return not values[0] or any(isinstance(text, str) and not text.strip() for text in further)


def read_records(
    file: SourceFile, reading: Reading = _READING, stats: ReadStats | None = None
) -> Iterator[Record]:
    """Streams the documents of one file, each in one piece. Otherwise the same as `read_parts`."""
    for part in whole(read_parts(file, reading, stats)):
        yield part.record


def whole(parts: Iterator[RecordPart]) -> Iterator[RecordPart]:
    """The documents of `parts`, each in one piece."""
    held: list[str] = []
    for part in parts:
        if part.first and part.last:
            yield part
            continue
        held.append(part.record.text)
        if part.last:
            field = next(iter(part.record.fields))
            yield part._replace(record=Record(part.record.name, {field: "".join(held)}), first=True)
            held = []


def places_of(file: SourceFile) -> dict[str, str]:
    """The values of the fields `FILE` and `FOLDER` for the documents of a file: `pos` and `train` for
    `train/pos.txt.gz`."""
    folder, name = os.path.split(os.path.abspath(file.path))
    stem = uncompressed_name(name)
    # A suffix that is not known, as in `reviews.pos` beside `reviews.neg`, may be what tells files apart.
    stem = os.path.splitext(stem)[0] if format_of(stem) else stem
    return {FILE: stem, FOLDER: os.path.basename(folder)}


def fields_within(fields: Iterable[str]) -> tuple[str, ...]:
    """The fields that a reader is asked for."""
    return tuple(field for field in fields if field not in (FILE, FOLDER))


def read_texts(file: SourceFile, reading: Reading = _READING) -> Iterator[Iterator[str]]:
    """Yields for each document an iterator over chunks of its text, to be used up before the next document."""
    parts = read_parts(file, reading)
    for part in parts:
        yield chunks_of(part, parts)


def chunks_of(part: RecordPart, parts: Iterator[RecordPart]) -> Iterator[str]:
    """The text of the document that begins with `part`, in chunks. Its further parts are taken from `parts`."""
    yield part.record.text
    while not part.last:
        part = next(parts)
        yield part.record.text


def _reader(file: SourceFile, reading: Reading) -> Callable[[SourceFile, Reading, ReadStats], Parts]:
    """The function of `READERS` for this file."""
    name = detect_format(file, reading)
    if name not in READERS:
        raise ValueError(f"{name!r} is a format without a reader; there are {', '.join(READERS)}")
    return READERS[name]


def detect_format(file: SourceFile, reading: Reading = _READING) -> str:
    """The format of a file, a key of `READERS`. A suffix that says something decides, and otherwise the content."""
    known = format_of(file.path)
    if known is not None and suffix_of(file.path) not in VAGUE_SUFFIXES:
        return known
    # A file that cannot be opened is named by whoever reads it.
    with contextlib.suppress(OSError), open(file.path, "rb") as stream:
        if known is None and stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC:
            return "parquet"
    # A file whose first object has the text field is JSON. One without this field is taken for text.
    with contextlib.suppress(UserError), open_text(file, reading, ReadStats()) as text:
        if begins_with_row(text, file, reading):
            return "rows"
    return "text"


def has_text(path: str, reading: Reading = _READING) -> bool:
    """Whether the file of JSON or the table at `path` is a corpus and not, say, settings: it has the text field."""
    has = {"rows": has_field, "table": has_column}[format_of(path) or ""]
    return has(SourceFile(path, path, 1, ""), reading)
