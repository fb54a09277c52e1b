"""JSON: a row a line, an array of objects, or objects one after the other. Each object is a document.

The content decides, not the suffix. No more than one object is held.
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

_BLOCK = 1 << 18
# Digits of a whole number that Python reads without being asked twice.
_DIGITS = 4000
# Levels of nesting that Python reads at once.
_DEPTH = 100
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_STRUCTURE, _IN_STRING = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')


def read_rows(file: SourceFile, reading: Reading, stats: ReadStats) -> Parts:
    """The documents of a file of JSON, named `file.jsonl#17` by line, or by object where objects are not lines."""
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
    """Whether the first object of a file of JSON has the text field. True where the file cannot be read, so that
    reading it says why."""
    with contextlib.suppress(UserError), open_text(file, reading, ReadStats()) as stream:
        lines = _layout(stream, file) == "lines"
        for _, data, _ in _lines(stream) if lines else _objects(stream, file):
            found = parse(data.decode("utf-8", "replace"), file.path)
            return isinstance(found, dict) and reading.fields[0] in found
        return False
    return True


def _layout(stream: io.BufferedReader, file: SourceFile) -> str:
    """How a file of JSON is laid out, by its beginning: "lines" or "objects"."""
    start = stream.peek(_BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    line, end, _ = start.partition(b"\n")
    if start.startswith(b"["):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(line)
            # More after a whole array in the first line: rows that are no objects, of which one is named.
            return "lines" if start[len(line) :].strip() else "objects"
        return "objects"
    if suffix_of(file.path) in LINE_SUFFIXES or not start.startswith(b"{"):
        return "lines"
    quoted = _TOKEN.findall(line.decode("utf-8", "replace"))
    depth = sum((token in "{[") - (token in "}]") for token in quoted)
    return "lines" if depth == 0 or not end else "objects"


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes, int]]:
    """(number, bytes, offset in the file) of each line that is not blank."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if data.strip(b" \t\r\n\x0b\x0c"):
            yield number, data, offset + len(line) - len(data)
        offset += len(line)


def _objects(stream: io.BufferedReader, file: SourceFile) -> Iterator[tuple[int, bytes, int]]:
    """(number, bytes, offset in the file) of the elements of an array, or of values one after the other.

    Brackets, commas and quotes tell where an element ends; whether it is JSON is for the parser to say.
    """
    number = depth = offset = begin = 0
    quoted = escaped = False
    outer: int | None = (
        None  # the depth of elements: 1 within an array, else 0; None before the first bracket
    )
    held: list[bytes] = []

    def element(rest: bytes) -> tuple[int, bytes, int]:
        data = b"".join([*held, rest])
        held.clear()
        return number, data.strip(), begin + len(data) - len(data.lstrip())

    while block := stream.read(_BLOCK):
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
            elif mark == b"," and depth == outer == 1:
                number += 1
                yield element(block[start : at - 1])
                start, begin = at, offset + at
            elif mark in b"]}":
                depth -= 1
                if depth == 0 and outer is not None:
                    number += 1
                    if (last := element(block[start : at - outer]))[1] or number > 1:
                        yield last
                    start, begin, outer = at, offset + at, None if outer else 0
        held.append(block[start:])
        offset += len(block)
    number += 1
    if rest := element(b"")[1]:
        kind = "is cut short" if depth or quoted else "is no JSON object"
        shown = plain_name(rest[:20].decode("utf-8", "replace"))
        raise UserError(
            f"data.sources: object {number} of {file.path!r} {kind} ({shown}): repair or remove the file."
        )


def parse(text: str, where: str) -> object:
    """The value of some JSON, also where it nests deeply or has numbers of thousands of digits."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _no_json(where, error) from None
    except (ValueError, RecursionError):
        pass
    try:
        # Whoever asks for such a number is told that it is no text.
        return json.loads(_flattened(text), parse_int=lambda digits: int(digits[:_DIGITS]))
    except (ValueError, RecursionError) as error:
        raise _no_json(where, error) from None


def _no_json(where: str, error: Exception) -> UserError:
    return UserError(f"data.sources: {where} is not JSON ({error}): correct or remove the line.")


def _flattened(text: str) -> str:
    """JSON with null in place of what nests deeper than `_DEPTH`."""
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
    """The fields of one row; None where the row is to be left out."""
    found = [_field(row, i, reading, at) for i in range(len(reading.fields))]
    values = [
        without_surrogates(value, reading, stats, kind + at) if isinstance(value, str) else value
        for value in found
    ]
    return all_or_none(values)


def _field(row: object, i: int, reading: Reading, at: str) -> str | int | None:
    """Field number `i` of one row: text, or where it is not the first one also an integer; None for null."""
    field = reading.fields[i]
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
    if isinstance(value, str) or (i and type(value) is int):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if value is None:
        refuse_null(i, reading, at)
        return None
    raise UserError(
        f"{name_of_field(i)} = {field!r} is a {type(value).__name__} in {at}, not a string"
        f"{' or an integer' if i else ''}: name another field or correct the line."
    )


def refuse_null(i: int, reading: Reading, at: str) -> None:
    """Raises `UserError` for a null where bad text is an error. Else the row is left out, for null cannot be mended."""
    if reading.on_bad_text == "error":
        raise UserError(
            f"data.on_bad_text = 'error' and {name_of_field(i)} = {reading.fields[i]!r} is null in {at}: remove the "
            "row, or set skip."
        )


def _names(row: Mapping[str, Any]) -> str:
    return plain_name(", ".join(row)) or "(none)"
