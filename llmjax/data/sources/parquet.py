"""Reads Parquet files with pyarrow. Each row is a document."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmjax.data.sources.compression import missing_package
from llmjax.data.sources.encoding import decode
from llmjax.data.sources.formats import uncompressed_name
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Part, Parts, Reading, ReadStats, all_or_none, name_of_field
from llmjax.data.sources.rows import refuse_null
from llmjax.errors import UserError, reason_of
from llmjax.names import is_unicode

# Rows that are read at once. A choice: rows of a corpus can be long, and all of a batch are in memory.
_ROWS = 256


def read_parquet(file: SourceFile, reading: Reading, stats: ReadStats) -> Parts:
    """The documents of a Parquet file, named by row: `file.parquet#17`.

    Raises `UserError` if pyarrow is not installed, if the file is damaged, if a field is missing or neither text nor
    (for fields other than the text) integers, or if text cannot be read while `reading.on_bad_text` is `error`.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise missing_package(file, "pyarrow") from None
    with contextlib.ExitStack() as stack:
        # Arrow accepts only paths that are valid UTF-8; it gets any other file as an open one.
        path = file.path if is_unicode(file.path) else stack.enter_context(open(file.path, "rb"))
        try:
            table = stack.enter_context(parquet.ParquetFile(path, page_checksum_verification=True))
            schema, num_rows = table.schema_arrow, table.metadata.num_rows
        except _errors():
            # Parquet compresses its own pages, and Arrow cannot read it through another compression.
            is_packed = uncompressed_name(file.path) != file.path
            kind, remedy = ("a compressed", "unpack") if is_packed else ("no", "remove")
            raise UserError(
                f"data.sources names {file.path!r}, which is {kind} Parquet file: {remedy} it."
            ) from None
        kinds = [_kind(schema, i, field, file, reading.structured) for i, field in enumerate(reading.fields)]
        before, number = stats.bytes_read, 0
        for columns in _batches(table, file, reading.fields, kinds):
            for row in zip(*columns):
                number += 1
                at = f"row {number} of {file.path!r}"
                values = [_value(value, i, file, reading, stats, at) for i, value in enumerate(row)]
                yield Part(f"{file.name}#{number}", all_or_none(values))
            # Arrow does not tell how far it has read, so progress is estimated from the rows.
            stats.bytes_read = before + file.size * number // max(num_rows, 1)


def _errors() -> tuple[type[Exception], ...]:
    """The exceptions that Arrow raises for a damaged file."""
    from pyarrow import lib

    return (lib.ArrowException, OSError, ValueError, OverflowError, IndexError)


def _kind(
    schema: Any, i: int, field: str, file: SourceFile, structured: Sequence[str]
) -> Callable[[Any], list]:
    """The function that turns a column of the field number `i` into a list of bytes, lists of bytes, or integers."""
    from pyarrow import types

    if field not in schema.names:
        raise UserError(
            f"{name_of_field(i)} = {field!r} is not a column of {file.path!r}, which has "
            f"{', '.join(schema.names)}: name one of these."
        )
    if schema.names.count(field) > 1:
        raise UserError(
            f"{name_of_field(i)} = {field!r} is the name of several columns of {file.path!r}: give each its own name."
        )
    kind = schema.field(field).type
    # Columns of a few repeated values may be stored as indices into a dictionary of the values.
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if _is_text(inner):
        return _text
    if field in structured and types.is_nested(inner):
        return _objects
    is_list = types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner)
    if is_list and _is_text(inner.value_type):
        return _lists
    if i and types.is_integer(inner):
        return lambda column: column.to_pylist()
    raise UserError(
        f"{name_of_field(i)} = {field!r} is a column of {kind} in {file.path!r}, not of text: name another field."
    )


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of strings or bytes."""
    from pyarrow import types

    # Older versions of pyarrow lack some of these tests, and then the types as well.
    tests = (
        "is_string",
        "is_large_string",
        "is_string_view",
        "is_binary",
        "is_large_binary",
        "is_binary_view",
    )
    return any(getattr(types, test)(kind) for test in tests if hasattr(types, test))


def _text(column: Any) -> list:
    """The strings of a column as bytes, because Arrow does not promise that its strings are valid UTF-8."""
    column = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
    return column.cast("large_binary").to_pylist()


def _lists(column: Any) -> list:
    """The lists of a column, with their strings as bytes. A null list, and a null within a list, is None."""
    import pyarrow

    column = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
    return column.cast(pyarrow.large_list(pyarrow.large_binary())).to_pylist()


def _objects(column: Any) -> list:
    """The lists or objects of a column as JSON text."""
    values = column.to_pylist()
    return [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]


def _batches(
    table: Any, file: SourceFile, fields: Sequence[str], kinds: Sequence[Callable[[Any], list]]
) -> Iterator[list[list]]:
    """Streams the columns of `fields` in batches of rows, each column turned into a list by its function in `kinds`.

    Raises `UserError` if a part of the file is damaged.
    """
    try:
        for batch in table.iter_batches(batch_size=_ROWS, columns=list(fields)):
            yield [kind(batch.column(field)) for kind, field in zip(kinds, fields)]
    except UserError:
        raise
    except _errors() as error:
        raise UserError(
            f"data.sources names {file.path!r}, which cannot be read ({reason_of(error)}): repair or remove it."
        ) from None


def _value(
    value: Any, i: int, file: SourceFile, reading: Reading, stats: ReadStats, at: str
) -> str | int | None:
    """One value as text or integer, or None if the document is to be left out. A list of strings becomes lines."""
    if isinstance(value, list):
        value = None if None in value else b"\n".join(value)
    if value is None:
        refuse_null(i, reading, at)
        return None
    return decode(value, file, reading, stats, at, 0) if isinstance(value, bytes) else value
