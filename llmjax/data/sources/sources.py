"""Sources to documents: files, directories, globs, JSON lines, Parquet, and this Python's standard library.

`list_sources` only looks at names and sizes; `read_records` streams one file, and never holds more of it
than one document (a plain text file is one document; a row of .jsonl or .parquet is one). Text is used as it
is: no newline is translated, nothing is stripped but a byte order mark.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmjax.errors import UserError, choose
from llmjax.names import is_unicode, plain_name

STDLIB = "stdlib"
_ROWS = (".jsonl", ".ndjson")
_TEXT = {
    ".txt",
    ".text",
    ".md",
    ".markdown",
    ".rst",
    ".tex",
    ".org",
    ".adoc",
    ".html",
    ".htm",
    ".xml",
    ".srt",
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cxx",
    ".hpp",
    ".cu",
    ".cuh",
    ".rs",
    ".go",
    ".java",
    ".kt",
    ".scala",
    ".swift",
    ".js",
    ".jsx",
    ".ts",
    ".tsx",
    ".css",
    ".sh",
    ".sql",
    ".r",
    ".jl",
    ".lua",
    ".rb",
    ".pl",
    ".php",
    ".hs",
    ".ml",
    ".ex",
    ".erl",
    ".f90",
    ".toml",
    ".yaml",
    ".yml",
    ".ini",
    ".cfg",
}
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# What becomes of a text that cannot be read: kept with U+FFFD, or left out. "error" has raised before it comes to that.
_BAD_TEXT = {"error": None, "skip": False, "replace": True}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the corpus.

    name      relative to the source that the file came from: the same on any machine
    path      where the file lies
    size      bytes on disk
    mtime_ns  time of the last change, in nanoseconds
    origin    which entry of data.sources named the file first, counted from 0
    """

    name: str
    path: str
    size: int
    mtime_ns: int
    origin: int = 0


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


@dataclasses.dataclass
class ReadStats:
    """What reading did, summed over all files it is passed to. `bytes_read` counts bytes on disk."""

    documents: int = 0
    empty: int = 0
    skipped: int = 0
    replaced: int = 0
    bytes_read: int = 0


def list_sources(sources: Sequence[str]) -> tuple[SourceFile, ...]:
    """The files that the sources name, sorted by name, each once.

    A source is a file (taken whatever its suffix), a directory (searched for files with a known suffix,
    hidden ones left out), a glob (`**` too; what it matches is taken as a shell would), or `stdlib`. Raises
    `UserError` where a source does not exist or holds nothing.
    """
    if isinstance(sources, str):
        raise UserError(f"data.sources = {sources!r} is one string: give a list of sources.")
    found: dict[str, SourceFile] = {}
    for origin, source in enumerate(sources):
        for name, path in _expand(source):
            key = os.path.realpath(path)
            if key not in found:
                stat = os.stat(path)
                found[key] = SourceFile(name, str(path), stat.st_size, stat.st_mtime_ns, origin)
    if not found:
        raise UserError("data.sources is empty: name files, directories or globs, or stdlib.")
    return tuple(sorted(found.values(), key=lambda file: (file.name, file.path)))


def read_records(
    file: SourceFile,
    *,
    fields: Sequence[str] = ("text",),
    on_bad_text: str = "error",
    stats: ReadStats | None = None,
) -> Iterator[Record]:
    """Streams the documents of one file, in its order. Empty ones are left out and counted in `stats`.

    Args:
      file: one of `list_sources`. Rows of it are named `file.jsonl#17`, counted from 1.
      fields: which fields of a row to take. The first one is the text; a document is empty when its text is. A
        file of plain text has nothing but its text.
      on_bad_text: what becomes of text that is not UTF-8 (in JSON, of lone surrogates): `error` raises a
        `UserError` with file, line and byte offset, `skip` leaves the document out, `replace` puts U+FFFD.
      stats: is counted up.
    """
    choose(_BAD_TEXT, "data.on_bad_text", on_bad_text)
    stats = ReadStats() if stats is None else stats
    before = stats.bytes_read
    reader = {"parquet": _read_parquet, "rows": _read_rows, "text": _read_text}[_format(file.path)]
    for name, values in reader(file, fields, on_bad_text, stats):
        if values is None:
            stats.skipped += 1
        elif not values[0]:
            stats.empty += 1
        else:
            stats.documents += 1
            yield Record(name, dict(zip(fields, values)))
    stats.bytes_read = before + file.size


def corpus_fingerprint(files: Iterable[SourceFile]) -> str:
    """A SHA-256 over names, sizes and times of change: cheap, and different when a file was edited."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.size, file.mtime_ns]).encode())
    return digest.hexdigest()


def _expand(source: str) -> list[tuple[str, str]]:
    """(name, path) of each file that one source names."""
    if source == STDLIB:
        return _walk(sysconfig.get_paths()["stdlib"], _is_stdlib)
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        files = _walk(path, _is_corpus)
        if not files:
            raise UserError(
                f"data.sources names {source!r}, a directory without text, .jsonl or .parquet "
                "files: name the files themselves if their suffix is unusual."
            )
        return files
    if not glob.has_magic(path):
        raise UserError(f"data.sources names {source!r}, which does not exist: check the path.")
    root = _fixed_part(path)
    files = []
    for match in sorted(glob.glob(path, recursive=True)):
        inside = [] if os.path.isfile(match) or "**" in path else [p for _, p in _walk(match, _is_corpus)]
        for found in inside or [match]:
            if os.path.isfile(found):
                files.append((os.path.relpath(found, root).replace(os.sep, "/"), found))
    if not files:
        raise UserError(f"data.sources names {source!r}, which matches no file: check the pattern.")
    return files


def _walk(root: str, keep) -> list[tuple[str, str]]:
    """(name relative to root, path) of the files whose path parts `keep` accepts, without following links."""
    found = []
    for folder, _, names in os.walk(root, onerror=_raise):
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).split(os.sep)
            if keep(relative) and os.path.isfile(path):
                found.append(("/".join(relative), path))
    return found


def _raise(error: OSError) -> None:
    """What `os.walk` does about a folder that it cannot read, rather than to pass it over in silence."""
    raise error


def _is_stdlib(parts: Sequence[str]) -> bool:
    """Python sources without tests, installed packages, and the build record of this one interpreter."""
    *folders, name = parts
    return (
        name.endswith(".py")
        and not name.startswith("_sysconfigdata")
        and not any(f in _NOT_STDLIB or f.startswith("config-") for f in folders)
    )


def _is_corpus(parts: Sequence[str]) -> bool:
    """Files with a known suffix, compressed or not; nothing hidden, nor in a hidden folder."""
    inner = _uncompressed(parts[-1])
    known = _format(inner) != "text" or os.path.splitext(inner)[1].lower() in _TEXT
    return known and not any(part.startswith(".") for part in parts)


def _uncompressed(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in _COMPRESSED else name


def _format(path: str) -> str:
    suffix = os.path.splitext(_uncompressed(path))[1].lower()
    return "parquet" if suffix == ".parquet" else "rows" if suffix in _ROWS else "text"


def _fixed_part(pattern: str) -> str:
    """The directory that a glob starts from: its leading parts without magic characters."""
    parts = Path(pattern).parts[:-1]
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return os.path.join(*parts[:fixed]) if fixed else "."


# What a reader yields: the name of a document, and the values of its fields; None where it is to be skipped.
_Rows = Iterator[tuple[str, "tuple[str | int, ...] | None"]]


def _read_text(file: SourceFile, fields: Sequence[str], on_bad_text: str, stats: ReadStats) -> _Rows:
    if len(fields) > 1:
        raise UserError(
            f"data.sources names {file.path!r}, a file of plain text, which has no field {fields[1]!r}: "
            "give JSON lines or Parquet."
        )
    with _open(file, stats) as stream:
        data = stream.read()
    try:
        text: str | None = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        declared = _declared_encoding(data) if file.path.endswith(".py") else None
        where = f"file {file.path!r}"
        text = data.decode(declared) if declared else _decode(data, on_bad_text, stats, where, 0)
    yield file.name, None if text is None else (text,)


def _read_rows(file: SourceFile, fields: Sequence[str], on_bad_text: str, stats: ReadStats) -> _Rows:
    offset = 0
    with _open(file, stats) as stream:
        for number, line in enumerate(stream, start=1):
            data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            where = plain_name(f"{file.path}:{number}")
            row = _decode(data, on_bad_text, stats, f"line {where}", offset + len(line) - len(data))
            offset += len(line)
            if row is None:
                yield f"{file.name}#{number}", None
            elif row.strip():
                parsed = _parse_row(row, where)
                found = [_field(parsed, i, fields, where) for i in range(len(fields))]
                values = [
                    _without_surrogates(value, on_bad_text, stats, where) if isinstance(value, str) else value
                    for value in found
                ]
                yield f"{file.name}#{number}", _all_or_none(values)


def _all_or_none(values: Sequence[str | int | None]) -> tuple[str | int, ...] | None:
    """The values of a row; None where one of them is text that is to be skipped."""
    there = tuple(value for value in values if value is not None)
    return there if len(there) == len(values) else None


def _read_parquet(file: SourceFile, fields: Sequence[str], on_bad_text: str, stats: ReadStats) -> _Rows:
    try:
        from pyarrow import lib, parquet
    except ImportError:
        raise _missing(file, "pyarrow") from None
    with contextlib.ExitStack() as stack:
        # Arrow takes no path that is not UTF-8.
        path = file.path if is_unicode(file.path) else stack.enter_context(open(file.path, "rb"))
        try:
            table = stack.enter_context(parquet.ParquetFile(path))
        except (lib.ArrowException, OSError):
            raise UserError(
                f"data.sources names {file.path!r}, which is no Parquet file: remove it."
            ) from None
        names = table.schema_arrow.names
        for i, field in enumerate(fields):
            if field not in names:
                raise UserError(
                    f"{_key(i)} = {field!r} is not a column of {file.path!r}, which has "
                    f"{', '.join(names)}: name one of these."
                )
        before, number = stats.bytes_read, 0
        for batch in _parquet_batches(table, file, fields):
            # Text is taken as bytes: Arrow does not promise that its strings are UTF-8.
            columns = [
                column if i and lib.types.is_integer(column.type) else column.cast("large_binary")
                for i, column in ((i, batch.column(field)) for i, field in enumerate(fields))
            ]
            for row in zip(*columns):
                number += 1
                where = f"row {number} of {file.path!r}"
                for i, value in enumerate(row):
                    if not value.is_valid:
                        raise UserError(f"{_key(i)} = {fields[i]!r} is null in {where}: remove the row.")
                values = [
                    _decode(value, on_bad_text, stats, where, 0) if isinstance(value, bytes) else value
                    for value in (value.as_py() for value in row)
                ]
                yield f"{file.name}#{number}", _all_or_none(values)
            stats.bytes_read = before + file.size * number // max(table.metadata.num_rows, 1)


def _parquet_batches(table, file: SourceFile, fields: Sequence[str]):
    """The columns in parts; `UserError` where a part of the file is damaged."""
    from pyarrow import lib

    try:
        yield from table.iter_batches(batch_size=256, columns=list(fields))
    except (lib.ArrowException, OSError) as error:
        raise UserError(
            f"data.sources names {file.path!r}, which cannot be read ({error}): repair or remove it."
        ) from None


def _parse_row(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.sources: {where} is not JSON ({error}): correct or remove the line.") from None


def _key(i: int) -> str:
    """What names the field number `i` in the config."""
    return "data.text_field" if i == 0 else "the field"


def _field(row: object, i: int, fields: Sequence[str], where: str) -> str | int:
    """Field number `i` of one row: text, or where it is not the first one also an integer."""
    field = fields[i]
    if not isinstance(row, dict):
        raise UserError(
            f'data.sources: {where} is no JSON object but a {type(row).__name__}: write {{"{field}": "..."}}.'
        )
    if field not in row:
        raise UserError(
            f"{_key(i)} = {field!r} is missing in {where}, which has the fields "
            f"{', '.join(row) or '(none)'}: name one of these."
        )
    value = row[field]
    if isinstance(value, str) or (i and type(value) is int):
        return value
    raise UserError(
        f"{_key(i)} = {field!r} is a {type(value).__name__} in {where}, not a string{' or an integer' if i else ''}: "
        "name another field or correct the line."
    )


def _decode(data: bytes, on_bad_text: str, stats: ReadStats, where: str, offset: int) -> str | None:
    """UTF-8 to text; None where the document is to be skipped. `data` begins at `offset` of its file."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if on_bad_text == "error":
            raise UserError(
                f"data.on_bad_text = 'error' and {where} is not UTF-8 at byte "
                f"{offset + error.start}: correct it, or set skip or replace."
            ) from None
    if not _BAD_TEXT[on_bad_text]:
        return None
    stats.replaced += 1
    return data.decode("utf-8", "replace")


def _without_surrogates(text: str, on_bad_text: str, stats: ReadStats, where: str) -> str | None:
    """JSON may spell half of a surrogate pair, `"\\ud800"`, which is no Unicode text."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if on_bad_text == "error":
            raise UserError(
                f"data.on_bad_text = 'error' and line {where} has a lone surrogate at character "
                f"{error.start} of its text: correct it, or set skip or replace."
            ) from None
    if not _BAD_TEXT[on_bad_text]:
        return None
    stats.replaced += 1
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _declared_encoding(data: bytes) -> str | None:
    """The encoding that a Python source declares (PEP 263), if the source can be read with it."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        data.decode(encoding)
        return encoding
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


@contextlib.contextmanager
def _open(file: SourceFile, stats: ReadStats) -> Iterator[io.BufferedIOBase]:
    """The file's uncompressed bytes, buffered; reading advances `stats.bytes_read` by bytes on disk."""
    suffix = os.path.splitext(file.path)[1].lower()
    uncompress, own_errors = _COMPRESSED.get(suffix, _plain)(file)
    errors: tuple[type[Exception], ...] = (OSError, EOFError, *own_errors)
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(_CountingFile(file.path, stats))
            yield stack.enter_context(uncompress(raw))
    except errors as error:
        raise UserError(
            f"data.sources names {file.path!r}, which cannot be read ({error}): repair or remove it."
        ) from None


def _plain(file: SourceFile) -> Uncompress:
    return _buffered, ()


def _buffered(raw: io.RawIOBase) -> io.BufferedIOBase:
    return io.BufferedReader(raw, 1 << 20)


def _gzip(file: SourceFile) -> Uncompress:
    return lambda raw: gzip.GzipFile(fileobj=io.BufferedReader(raw)), (zlib.error,)


def _zstandard(file: SourceFile) -> Uncompress:
    try:
        import zstandard
    except ImportError:
        raise _missing(file, "zstandard") from None

    def uncompress(raw: io.FileIO) -> io.BufferedIOBase:
        reader: Any = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return _buffered(reader)  # a RawIOBase, although its types do not say so

    return uncompress, (zstandard.ZstdError,)


# From the bytes on disk to those of the text, and the errors of its own that this may raise.
Uncompress = tuple[Callable[[io.FileIO], io.BufferedIOBase], tuple[type[Exception], ...]]
_COMPRESSED: dict[str, Callable[[SourceFile], Uncompress]] = {".gz": _gzip, ".zst": _zstandard}


class _CountingFile(io.FileIO):
    """A raw file that adds what is read from it to `stats.bytes_read`."""

    def __init__(self, path: str, stats: ReadStats):
        super().__init__(path, "rb")
        self._stats = stats

    def readinto(self, buffer) -> int | None:
        count = super().readinto(buffer)
        self._stats.bytes_read += count or 0
        return count


def _missing(file: SourceFile, package: str) -> UserError:
    return UserError(
        f"data.sources names {file.path!r}, which needs the package {package}: run "
        "pip install 'llmjax[data]'."
    )
