"""Reads files of plain text. Each file is one document, used as it is, and is read in parts so that it may be larger
than memory."""

from __future__ import annotations

import codecs
import io
import tokenize
from collections.abc import Iterator

from llmjax.data.sources.encoding import WrongEncodingError, decode, not_utf8, open_text
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import BAD_TEXT, Part, Parts, Reading, ReadStats, with_ends
from llmjax.errors import UserError

# The most bytes of a file that are decoded at once, which is the size of a part. A choice: large enough to be fast.
CHUNK_BYTES = 1 << 20


def read_text(file: SourceFile, reading: Reading, stats: ReadStats) -> Parts:
    """The document that a file of plain text is, in parts if it is long.

    Newlines stay as they are. A byte order mark is left out. Raises `UserError` if `reading` asks for further fields,
    or if the text cannot be read and `reading.on_bad_text` is `error`.
    """
    if len(reading.fields) > 1:
        raise UserError(
            f"data.sources names {file.path!r}, a file of plain text, which has no field {reading.fields[1]!r}: "
            "give JSON lines, Parquet or a table."
        )
    if file.path.endswith(".py") and reading.is_utf8:
        yield Part(file.name, _read_python(file, reading, stats))
        return
    if reading.on_bad_text == "skip" and not _is_readable(file, reading):
        yield Part(file.name, None)
        return
    is_empty = True
    for text, first, last in with_ends(_decoded(file, reading, stats)):
        is_empty = False
        yield Part(file.name, (text,), first, last)
    if is_empty:
        yield Part(file.name, ("",))


def _decoded(file: SourceFile, reading: Reading, stats: ReadStats) -> Iterator[str]:
    """The text in chunks that are not empty. A file with U+FFFD for bad bytes is counted in `stats.replaced`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed, at_start, ended = 0, True, False
    with open_text(file, reading, stats) as stream:
        while not ended:
            data = stream.read(CHUNK_BYTES)
            ended = not data
            # The state has the bytes of a character that the last chunk cut in two.
            state = decoder.getstate()
            try:
                text = decoder.decode(data, final=ended)
            except UnicodeDecodeError as error:
                if not BAD_TEXT[reading.on_bad_text]:
                    at = consumed - len(state[0]) + error.start
                    raise not_utf8(file, reading, f"file {file.path!r}", at) from None
                stats.replaced += 1
                # From here on every bad byte becomes U+FFFD. The chunk is decoded again from where it began.
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                decoder.setstate(state)
                text = decoder.decode(data, final=ended)
            consumed += len(data)
            if at_start and text:
                text, at_start = text.removeprefix("\ufeff"), False
            if text:
                yield text


def _is_readable(file: SourceFile, reading: Reading) -> bool:
    """Whether the whole file is UTF-8.

    A file with a bad byte near its end is left out from its beginning on, so it is read once before its first part is
    yielded.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_text(file, reading, ReadStats()) as stream:
            while data := stream.read(CHUNK_BYTES):
                decoder.decode(data)
            decoder.decode(b"", final=True)
    except (UnicodeDecodeError, WrongEncodingError):
        return False
    return True


def _read_python(file: SourceFile, reading: Reading, stats: ReadStats) -> tuple[str] | None:
    """The text of a Python source, whole, or None if it is to be left out.

    A source that is not UTF-8 is read in the encoding that it declares.
    """
    try:
        with open_text(file, reading, stats) as stream:
            data = stream.read()
    except WrongEncodingError:
        if reading.on_bad_text == "skip":
            return None
        raise
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
        # The declaration must still be there in the encoding that it names, as it would not be in UTF-16.
        return encoding if "coding" in data.decode(encoding) else None
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
