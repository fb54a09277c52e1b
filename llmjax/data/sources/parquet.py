"""Parquet: each row is a document."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmjax.data.sources.compression import missing_package
from llmjax.data.sources.encoding import decode
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Part, Parts, Reading, ReadStats, all_or_none, name_of_field
from llmjax.data.sources.rows import refuse_null
from llmjax.errors import UserError
from llmjax.names import is_unicode

_ROWS = 256


def read_parquet(file: SourceFile, reading: Reading, stats: ReadStats) -> Parts:
    """The documents of a Parquet file, named `file.parquet#17` by row."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise missing_package(file, "pyarrow") from None
    with contextlib.ExitStack() as stack:
        # Arrow takes no path that is not UTF-8.
        path = file.path if is_unicode(file.path) else stack.enter_context(open(file.path, "rb"))
        try:
            table = stack.enter_context(parquet.ParquetFile(path, page_checksum_verification=True))
            schema, num_rows = table.schema_arrow, table.metadata.num_rows
        except _errors():
            raise UserError(
                f"data.sources names {file.path!r}, which is no Parquet file: remove it."
            ) from None
        kinds = [_kind(schema, i, field, file) for i, field in enumerate(reading.fields)]
        before, number = stats.bytes_read, 0
        for columns in _batches(table, file, reading.fields, kinds):
            for row in zip(*columns):
                number += 1
                at = f"row {number} of {file.path!r}"
                values = [_value(value, i, file, reading, stats, at) for i, value in enumerate(row)]
                yield Part(f"{file.name}#{number}", all_or_none(values))
            stats.bytes_read = before + file.size * number // max(num_rows, 1)


def _errors() -> tuple[type[Exception], ...]:
    """What Arrow raises for a file that is not what it should be."""
    from pyarrow import lib

    return (lib.ArrowException, OSError, ValueError, OverflowError, IndexError)


def _kind(schema: Any, i: int, field: str, file: SourceFile) -> Callable[[Any], list]:
    """What makes a list of Python values of a column: bytes, lists of bytes, or integers."""
    from pyarrow import types

    if field not in schema.names:
        raise UserError(
            f"{name_of_field(i)} = {field!r} is not a column of {file.path!r}, which has "
            f"{', '.join(schema.names)}: name one of these."
        )
    kind = schema.field(field).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if _is_text(inner):
        return _text
    is_list = types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner)
    if is_list and _is_text(inner.value_type):
        return _lists
    if i and types.is_integer(inner):
        return lambda column: column.to_pylist()
    raise UserError(
        f"{name_of_field(i)} = {field!r} is a column of {kind} in {file.path!r}, not of text: name another field."
    )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

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
    """Text is taken as bytes: Arrow does not promise that its strings are UTF-8."""
    column = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
    return column.cast("large_binary").to_pylist()


def _lists(column: Any) -> list:
    """The strings of each list as bytes; None for null, and within a list for what is null there."""
    import pyarrow

    column = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
    return column.cast(pyarrow.large_list(pyarrow.large_binary())).to_pylist()


def _batches(
    table: Any, file: SourceFile, fields: Sequence[str], kinds: Sequence[Callable[[Any], list]]
) -> Iterator[list[list]]:
    """The columns in parts; `UserError` where a part of the file is damaged."""
    try:
        for batch in table.iter_batches(batch_size=_ROWS, columns=list(fields)):
            yield [kind(batch.column(field)) for kind, field in zip(kinds, fields)]
    except UserError:
        raise
    except _errors() as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"data.sources names {file.path!r}, which cannot be read ({text}): repair or remove it."
        ) from None


def _value(
    value: Any, i: int, file: SourceFile, reading: Reading, stats: ReadStats, at: str
) -> str | int | None:
    if isinstance(value, list):
        value = None if None in value else b"\n".join(value)
    if value is None:
        refuse_null(i, reading, at)
        return None
    return decode(value, file, reading, stats, at, 0) if isinstance(value, bytes) else value
