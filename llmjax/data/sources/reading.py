"""What all readers of files share: the settings of the config, the counts of what was read, and parts of documents."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from llmjax.errors import UserError, choose

Item = TypeVar("Item")
# Stands for no item.
_NOTHING: Any = object()
# data.on_bad_text -> whether a document with text that cannot be read is kept, with U+FFFD in place of what cannot be
# read. With "error" the reader raises, and the question does not arise.
BAD_TEXT = {"error": None, "skip": False, "replace": True}
# The default encoding of text and JSON.
ENCODING = "utf-8"
# The default of `Reading.max_expansion`. A choice: text usually unpacks to three to ten times its compressed size. A
# file that unpacks to far more is likely to be damaged, or made to fill a memory or a disk (a decompression bomb).
MAX_EXPANSION = 250


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    fields         the fields to take from each row of JSON, Parquet or a table. The first is the text, and a document
                   whose text is empty is an empty document. A file of plain text has only one field, its text
    on_bad_text    what to do with text that cannot be read: bytes that do not belong to the encoding, half a surrogate
                   pair in JSON, or null. `error` raises a `UserError` with file, line and byte offset. `skip` leaves
                   the document out. `replace` puts U+FFFD in place of what cannot be read, and leaves out documents
                   with null
    encoding       the encoding of text, JSON and tables, by any name that Python knows
    max_expansion  a compressed file may unpack to this many times its own size. The first 16 MiB are always allowed
    columns        the names of the columns of tables whose first line does not have them; () if it has
    texts          further fields with text: a document in which one of them is empty is an empty document
    structured     the fields that hold lists or objects of JSON, which are read as JSON text
    """

    fields: tuple[str, ...] = ("text",)
    on_bad_text: str = "error"
    encoding: str = ENCODING
    max_expansion: int = MAX_EXPANSION
    columns: tuple[str, ...] = ()
    structured: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self):
        choose(BAD_TEXT, "data.on_bad_text", self.on_bad_text)
        check_encoding(self.encoding)

    @property
    def is_utf8(self) -> bool:
        """Whether files are read as UTF-8, with or without a byte order mark, under whatever name."""
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")


def check_encoding(name: str) -> None:
    """Raises `UserError` if Python knows no text encoding called `name`."""
    try:
        # Raises LookupError for codecs from bytes to bytes too, such as hex.
        "".encode(name)
    except (LookupError, UnicodeError, ValueError):
        raise UserError(
            f"data.encoding={name!r} is no encoding that Python knows; use utf-8, utf-16, gb18030, big5, shift_jis, "
            "latin-1 or another of its codecs"
        ) from None


@dataclasses.dataclass
class ReadStats:
    """Counts of what was read, summed over all files that are read with the same object.

    documents   documents that were read
    empty       documents that were left out because their text is empty
    skipped     documents that were left out because their text cannot be read
    replaced    pieces of text with U+FFFD in place of what cannot be read; in a file of JSON or Parquet a piece is a
                field, in a table it is a row, and a file of plain text is a single piece
    bytes_read  bytes on disk, which of a compressed file are fewer than its text has
    """

    documents: int = 0
    empty: int = 0
    skipped: int = 0
    replaced: int = 0
    bytes_read: int = 0


class Part(NamedTuple):
    """A document, or a part of a long document. The reader of each format yields these.

    name    where the document comes from, such as `poems.jsonl#17`
    values  the values of `Reading.fields`, or None if the document is to be left out. A document in several parts has
            the text as its only field
    first   whether the document begins with this part
    last    whether the document ends with this part
    """

    name: str
    values: tuple[str | int, ...] | None
    first: bool = True
    last: bool = True


# What a reader returns.
Parts = Iterator[Part]


def with_ends(items: Iterable[Item]) -> Iterator[tuple[Item, bool, bool]]:
    """Yields each item, whether it is the first and whether it is the last. An item is held back until the next one is
    there."""
    first, held = True, _NOTHING
    for item in items:
        if held is not _NOTHING:
            yield held, first, False
            first = False
        held = item
    if held is not _NOTHING:
        yield held, first, True


def name_of_field(i: int) -> str:
    """What errors call the field number `i`: the config key of the first one, and "the field" for others."""
    return "data.text_field" if i == 0 else "the field"


def all_or_none(values: Sequence[str | int | None]) -> tuple[str | int, ...] | None:
    """The values of a row, or None if one of them is None: such a document is left out as a whole."""
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else None
