"""What the config says about reading text, what reading counts, and what a reader of a format yields."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from llmjax.errors import UserError, choose

# What becomes of a text that cannot be read: kept with U+FFFD, or left out. "error" has raised before it comes to that.
BAD_TEXT = {"error": None, "skip": False, "replace": True}
ENCODING = "utf-8"
MAX_EXPANSION = 250


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    fields         which fields of a row to take. The first one is the text; a document is empty when its text is. A
                   file of plain text has nothing but its text
    on_bad_text    what becomes of text that is not of the encoding, in JSON of lone surrogates, and of null: `error`
                   raises a `UserError` with file, line and byte offset, `skip` leaves the document out, `replace` puts
                   U+FFFD, and leaves null out
    encoding       of text and JSON, under any name that Python knows
    max_expansion  times its own size that a compressed file may unpack to; the first 16 MiB always may
    """

    fields: tuple[str, ...] = ("text",)
    on_bad_text: str = "error"
    encoding: str = ENCODING
    max_expansion: int = MAX_EXPANSION

    def __post_init__(self):
        choose(BAD_TEXT, "data.on_bad_text", self.on_bad_text)
        check_encoding(self.encoding)

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")


def check_encoding(name: str) -> None:
    """Raises `UserError` where Python knows no encoding of text called `name`."""
    try:
        "".encode(name)  # raises LookupError also for codecs of bytes, such as hex
    except (LookupError, UnicodeError, ValueError):
        raise UserError(
            f"data.encoding={name!r} is no encoding that Python knows; use utf-8, utf-16, gb18030, big5, shift_jis, "
            "latin-1 or another of its codecs"
        ) from None


@dataclasses.dataclass
class ReadStats:
    """What reading did, summed over all files it is passed to. `bytes_read` counts bytes on disk."""

    documents: int = 0
    empty: int = 0
    skipped: int = 0
    replaced: int = 0
    bytes_read: int = 0


class Part(NamedTuple):
    """A document, or a part of a long one: what a reader of a format yields.

    name         where the document comes from, such as `poems.jsonl#17`
    values       of its fields; None where the document is left out. A part has the single field text
    first, last  whether the document begins and ends with this part
    """

    name: str
    values: tuple[str | int, ...] | None
    first: bool = True
    last: bool = True


Parts = Iterator[Part]


def name_of_field(i: int) -> str:
    """What names the field number `i` in the config."""
    return "data.text_field" if i == 0 else "the field"


def all_or_none(values) -> tuple[str | int, ...] | None:
    """The values of a row; None where one of them is text that is left out."""
    there = tuple(value for value in values if value is not None)
    return there if len(there) == len(values) else None
