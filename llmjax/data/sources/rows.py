"""Reads files of JSON. Each object is a document.

There are three layouts: an object in each line, one array of objects, and objects one after the other that may go over
several lines. The content of a file decides which one it is, and the suffix only where the content leaves it open. No
more than one object is in memory.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmjax.data.sources.encoding import decode, open_text, without_surrogates
from llmjax.data.sources.formats import LINE_SUFFIXES, suffix_of
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Part, Parts, Reading, ReadStats, all_or_none, name_of_field
from llmjax.errors import UserError
from llmjax.names import plain_name

# Bytes that are read at once. A choice.
_BLOCK = 1 << 18
# The most bytes that are looked at to find out whether a file is JSON. A choice: rows are shorter.
_HEAD = 1 << 20
# The most digits of an integer that are read. Python refuses to read more than 4300 (sys.get_int_max_str_digits).
_DIGITS = 4000
# The deepest nesting that is read where Python's parser runs out of its stack. A choice: fields that can be used are
# strings, or lists of strings, and lie far above.
_DEPTH = 100
# A whole string, or a bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
# What changes the state of `_objects` outside of a string, and within one.
_STRUCTURE, _IN_STRING = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')


def read_rows(file: SourceFile, reading: Reading, stats: ReadStats) -> Parts:
    """The documents of a file of JSON, named by line, `file.jsonl#17`, or by object if objects are not lines.

    Raises `UserError` if an object is not JSON or lacks a field, if a field is neither text nor (for fields other than
    the text) an integer, or if text cannot be read while `reading.on_bad_text` is `error`.
    """
    with open_text(file, reading, stats) as stream:
        lines = _layout(stream, file) == "lines"
        for number, data, offset in _lines(stream) if lines else _objects(stream, file):
            at = plain_name(f"{file.path}:{number}") if lines else f"object {number} of {file.path!r}"
            text = decode(data, file, reading, stats, f"line {at}" if lines else at, offset)
            values = None
            if text is not None:
                found = parse(text, at)
                values = read_fields(found, reading, stats, at, "line " if lines else "")
            yield Part(f"{file.name}#{number}", values)


def has_field(file: SourceFile, reading: Reading) -> bool:
    """Whether the first object of a file of JSON has the text field.

    True if the file cannot be read, so that the attempt to read it as a corpus says what is wrong.
    """
    with contextlib.suppress(UserError), open_text(file, reading, ReadStats()) as stream:
        lines = _layout(stream, file) == "lines"
        return _first_has_field(_lines(stream) if lines else _objects(stream, file), file, reading)
    return True


def begins_with_row(stream: io.BufferedReader, file: SourceFile, reading: Reading) -> bool:
    """Whether a stream is JSON whose first object has the text field, judged by at most its first `_HEAD` bytes."""
    if not _trimmed(stream.peek(_BLOCK)).startswith((b"{", b"[")):
        return False
    data = stream.read(_HEAD)
    head: Any = io.BufferedReader(io.BytesIO(data))
    with contextlib.suppress(UserError):
        rows = _lines(head) if _layout(head, file) == "lines" else _objects(head, file)
        return _first_has_field(rows, file, reading)
    # The first object may be longer. Then it is enough that it looks like one and names the field.
    name = re.escape(json.dumps(reading.fields[0], ensure_ascii=False).encode("utf-8", "replace"))
    is_cut = len(data) == _HEAD and re.match(rb'[\[\s]*\{\s*"', _trimmed(data))
    return bool(is_cut and re.search(name + rb"\s*:", data))


def _first_has_field(rows: Iterator[tuple[int, bytes, int]], file: SourceFile, reading: Reading) -> bool:
    """Whether the first row that is not null is an object with the text field. Raises `UserError` if it is no JSON."""
    for _, data, _ in rows:
        found = parse(data.decode("utf-8", "replace"), file.path)
        if found is not None:
            return isinstance(found, dict) and reading.fields[0] in found
    return False


def _trimmed(start: bytes) -> bytes:
    """The beginning of a file without byte order mark and white space."""
    return start.removeprefix(codecs.BOM_UTF8).lstrip()


def _layout(stream: io.BufferedReader, file: SourceFile) -> str:
    """How a file of JSON is laid out, judged by its first block: "lines", or "objects" for both other layouts."""
    start = _trimmed(stream.peek(_BLOCK))
    line, end, _ = start.partition(b"\n")
    if start.startswith(b"["):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(line)
            # The first line is a whole array. If lines follow, each is a row, and the reader will say that the first
            # row is not an object. If none follow, the array has the rows.
            return "lines" if start[len(line) :].strip() else "objects"
        return "objects"
    if suffix_of(file.path) in LINE_SUFFIXES or not start.startswith(b"{"):
        return "lines"
    # A first line that closes all its brackets is an object by itself, and so is a single line.
    tokens = _TOKEN.findall(line.decode("utf-8", "replace"))
    depth = sum((token in "{[") - (token in "}]") for token in tokens)
    return "lines" if depth == 0 or not end else "objects"


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, bytes, offset in the file in bytes) of each line that is not blank."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if data.strip(b" \t\r\n\x0b\x0c"):
            yield number, data, offset + len(line) - len(data)
        offset += len(line)


def _objects(stream: io.BufferedReader, file: SourceFile) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, bytes, offset in the file) of the elements of an array, or of values one after the other.

    Brackets, commas and quotes tell where an element ends. Raises `UserError` if the last element has no end.
    """
    # `offset` is where the block begins in the file, and `begin` where the element does.
    number = depth = offset = begin = 0
    quoted = escaped = False
    # The depth of brackets at which elements lie: 1 in an array, 0 for other values. It is None, which means unknown,
    # before the first bracket and after an array.
    outer: int | None = None
    # What earlier blocks have of the element. `element` adds the rest of it.
    held: list[bytes] = []

    def element(rest: bytes) -> tuple[int, bytes, int]:
        data = b"".join([*held, rest])
        held.clear()
        return number, data.strip(), begin + len(data) - len(data.lstrip())

    while block := stream.read(_BLOCK):
        # Where the element begins in the block, and how far the block has been read.
        start = at = 0
        if not offset and block.startswith(codecs.BOM_UTF8):
            start = at = begin = len(codecs.BOM_UTF8)
        while at < len(block):
            if escaped:
                escaped, at = False, at + 1
                continue
            found = (_IN_STRING if quoted else _STRUCTURE).search(block, at)
            if found is None:
                break
            at, mark = found.end(), found[0]
            if quoted:
                quoted, escaped = mark != b'"', mark == b"\\"
            elif mark == b'"':
                quoted = True
            elif mark in b"[{":
                depth += 1
                if outer is None:
                    outer = 1 if mark == b"[" else 0
                    if outer:
                        start, begin = at, offset + at
            # A comma ends an element of the array; commas between values that are not in an array mean nothing.
            elif mark == b"," and depth == outer == 1:
                number += 1
                yield element(block[start : at - 1])
                start, begin = at, offset + at
            elif mark in b"]}":
                depth -= 1
                # The end of an array, whose bracket is not part of its last element, or of another value.
                if depth == 0 and outer is not None:
                    number += 1
                    # An empty array has no element.
                    if (last := element(block[start : at - outer]))[1] or number > 1:
                        yield last
                    start, begin, outer = at, offset + at, None if outer else 0
        held.append(block[start:])
        offset += len(block)
    number += 1
    # An array that ends after a comma has no rest, but it is cut short all the same.
    is_open = depth > 0 or quoted
    if (rest := element(b"")[1]) or is_open:
        raise _unfinished(number, rest, is_open, file)


def _unfinished(number: int, rest: bytes, is_open: bool, file: SourceFile) -> UserError:
    """The error for bytes after the last element. `is_open` says whether a bracket or a quote was not closed."""
    kind = "is cut short" if is_open else "is no JSON object"
    shown = f" ({plain_name(rest[:20].decode('utf-8', 'replace'))})" if rest else ""
    return UserError(
        f"data.sources: object {number} of {file.path!r} {kind}{shown}: repair or remove the file."
    )


def parse(text: str, where: str) -> object:
    """The value of a text of JSON, which may nest deeply or have numbers of thousands of digits.

    What nests deeper than Python's parser can read becomes null, and integers of too many digits lose digits. Neither
    can be used as a field. Raises `UserError`, which names the place as `where`, if the text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _no_json(where, error) from None
    except (ValueError, RecursionError):
        pass
    try:
        # A number that is read wrongly does no harm: as the text it is refused, whatever its value.
        return json.loads(_flattened(text), parse_int=lambda digits: int(digits[:_DIGITS]))
    except (ValueError, RecursionError) as error:
        raise _no_json(where, error) from None


def _no_json(where: str, error: Exception) -> UserError:
    """The error for a text that is not JSON. `where` says where it lies."""
    return UserError(f"data.sources: {where} is not JSON ({error}): correct or remove the line.")


def _flattened(text: str) -> str:
    """The text of JSON with null in place of everything that nests deeper than `_DEPTH`."""
    kept: list[str] = []
    depth = start = 0
    for token in _TOKEN.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth == _DEPTH + 1:
                kept += [text[start : token.start()], "null"]
        elif token[0] in ("]", "}"):
            depth -= 1
            if depth == _DEPTH:
                start = token.end()
    return "".join([*kept, text[start:]])


def read_fields(
    row: object, reading: Reading, stats: ReadStats, at: str, kind: str
) -> tuple[str | int, ...] | None:
    """The values of `reading.fields` in one row, or None if the row is to be left out.

    Args:
      row: a value that was read from JSON.
      reading: how files are read.
      stats: counts what is replaced.
      at: what errors call the row, such as `object 17 of ...`.
      kind: what comes before `at` in errors about characters, such as `line `.

    Raises `UserError` for a row that is not an object, for missing fields and for fields of another type.
    """
    found = [_field(row, i, reading, at) for i in range(len(reading.fields))]
    values = [
        without_surrogates(value, reading, stats, kind + at) if isinstance(value, str) else value
        for value in found
    ]
    return all_or_none(values)


def _field(row: object, i: int, reading: Reading, at: str) -> str | int | None:
    """Field number `i` of one row: text, an integer if it is not the first field, or None for null.

    A list of strings becomes a text with a line for each. If the row itself or a line of the list is null, so is the
    field.
    """
    field = reading.fields[i]
    if row is None:
        refuse_null(i, reading, at)
        return None
    if not isinstance(row, dict):
        raise UserError(
            f'data.sources: {at} is no JSON object but a {type(row).__name__}: write {{"{field}": "..."}}.'
        )
    if field not in row:
        raise UserError(
            f"{name_of_field(i)} = {field!r} is missing in {at}, which has the fields "
            f"{_names(row)}: name one of these."
        )
    value = row[field]
    if isinstance(value, list | dict) and field in reading.structured:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) or (i and type(value) is int):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if value is None or (isinstance(value, list) and all(isinstance(v, str | None) for v in value)):
        refuse_null(i, reading, at)
        return None
    raise UserError(
        f"{name_of_field(i)} = {field!r} is a {type(value).__name__} in {at}, not a string"
        f"{' or an integer' if i else ''}: name another field or correct the line."
    )


def refuse_null(i: int, reading: Reading, at: str) -> None:
    """Raises `UserError` for a null in field number `i` if `reading.on_bad_text` is `error`.

    Otherwise the caller leaves the row out, with `replace` as well, because nothing can replace the missing text.
    """
    if reading.on_bad_text == "error":
        raise UserError(
            f"data.on_bad_text = 'error' and {name_of_field(i)} = {reading.fields[i]!r} is null in {at}: remove the "
            "row, or set skip."
        )


def _names(row: Mapping[str, Any]) -> str:
    """The names of the fields of a row, for errors."""
    return plain_name(", ".join(row)) or "(none)"
