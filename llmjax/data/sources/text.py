"""Files of plain text: each is one document, used as it is, of which no more is held than a part."""

from __future__ import annotations

import codecs
import io
import tokenize
from collections.abc import Iterator

from llmjax.data.sources.encoding import decode, not_utf8, open_text
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import BAD_TEXT, Part, Parts, Reading, ReadStats
from llmjax.errors import UserError

CHUNK_BYTES = 1 << 20


def read_text(file: SourceFile, reading: Reading, stats: ReadStats) -> Parts:
    """The text of the file, in parts where it is long. No newline is translated; a byte order mark is left out."""
    if len(reading.fields) > 1:
        raise UserError(
            f"data.sources names {file.path!r}, a file of plain text, which has no field {reading.fields[1]!r}: "
            "give JSON lines or Parquet."
        )
    if file.path.endswith(".py") and reading.is_utf8:
        yield Part(file.name, _read_python(file, reading, stats))
        return
    if reading.on_bad_text == "skip" and not _is_readable(file, reading):
        yield Part(file.name, None)
        return
    first, held = True, ""
    for text in _decoded(file, reading, stats):
        if held:
            yield Part(file.name, (held,), first, last=False)
            first = False
        held = text
    yield Part(file.name, (held,), first, last=True)


def _decoded(file: SourceFile, reading: Reading, stats: ReadStats) -> Iterator[str]:
    """The text in chunks, none of them empty. Where U+FFFD stands for anything, the file is counted as replaced."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed, mark, ended = 0, True, False
    with open_text(file, reading, stats) as stream:
        while not ended:
            data = stream.read(CHUNK_BYTES)
            ended = not data
            state = decoder.getstate()
            try:
                text = decoder.decode(data, final=ended)
            except UnicodeDecodeError as error:
                if not BAD_TEXT[reading.on_bad_text]:
                    at = consumed - len(state[0]) + error.start
                    raise not_utf8(file, reading, f"file {file.path!r}", at) from None
                stats.replaced += 1
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                decoder.setstate(state)
                text = decoder.decode(data, final=ended)
            consumed += len(data)
            if mark and text:
                text, mark = text.removeprefix("\ufeff"), False
            if text:
                yield text


def _is_readable(file: SourceFile, reading: Reading) -> bool:
    """Whether all of the file is text: what is left out for a byte near its end is left out whole."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_text(file, reading, ReadStats()) as stream:
        try:
            while data := stream.read(CHUNK_BYTES):
                decoder.decode(data)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _read_python(file: SourceFile, reading: Reading, stats: ReadStats) -> tuple[str] | None:
    """A Python source, whole, in the encoding that it declares where it is not UTF-8."""
    with open_text(file, reading, stats) as stream:
        data = stream.read()
    try:
        return (data.removeprefix(codecs.BOM_UTF8).decode(),)
    except UnicodeDecodeError:
        declared = _declared_encoding(data)
    if declared:
        return (data.decode(declared),)
    text = decode(data, file, reading, stats, f"file {file.path!r}", 0)
    return None if text is None else (text,)


def _declared_encoding(data: bytes) -> str | None:
    """The encoding that a Python source declares (PEP 263), if the source can be read with it."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        data.decode(encoding)
        return encoding
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
