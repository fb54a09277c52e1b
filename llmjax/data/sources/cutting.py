"""Cuts the documents of a file: at the matches of a regular expression, and into a beginning and a held-out tail.

Both work on text, before it is tokenized, so that every part is a document of its own with its own bos and eos, and no
token lies across a cut. The parts of a document, joined, are the document.
"""

from __future__ import annotations

import array
import dataclasses
import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator

from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Reading, ReadStats, with_ends
from llmjax.data.sources.records import Record, RecordPart, chunks_of, read_parts
from llmjax.errors import UserError

# In a document that comes in chunks, a match may be cut by the end of what has been read. It counts once this many
# characters after it are known, and as many before it are kept for what looks back.
WINDOW = 1 << 16
# The longest time in seconds that one search for a match may take. A choice: a search in the text that is held at once,
# which is about a million characters, usually takes milliseconds.
SEARCH_SECONDS = 30.0
# What the name of a document's held-out tail ends with.
TAIL = " (tail)"


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How documents are cut.

    split_on  a regular expression at whose matches a document is cut into several; "" cuts none
    tail      the fraction of the characters of each document, after `split_on`, that is held out at its end; 0 for none
    """

    split_on: str = ""
    tail: float = 0.0

    def __post_init__(self):
        compile_split_on(self.split_on)


def compile_split_on(pattern: str) -> re.Pattern[str]:
    """Compiles `data.split_on`, with `^` and `$` at every line.

    Raises UserError if it is no regular expression, or matches the empty text, where it would cut everywhere.
    """
    try:
        with warnings.catch_warnings():
            # Python warns of patterns, such as [[a], whose meaning a later version may change.
            warnings.simplefilter("ignore")
            compiled = re.compile(pattern, re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"data.split_on={pattern!r} is no regular expression ({error}); correct it, or set it to '' to cut nothing"
        ) from None
    if pattern and compiled.search(""):
        raise UserError(
            f"data.split_on={pattern!r} matches the empty text, so it would cut everywhere; write what must stand there"
        )
    return compiled


# Documents as they are.
WHOLE = Cutting()


def cut_parts(
    file: SourceFile, reading: Reading, stats: ReadStats | None = None, cutting: Cutting = WHOLE
) -> Iterator[RecordPart]:
    """Streams the documents of one file as `read_parts` does, cut as `cutting` says.

    The parts of a file that is held out, and those of a tail, have `held_out` set. Where there are tails, the file is
    read twice, because where the tail of a document begins is known only at its end.
    """
    parts = _split(read_parts(file, reading, stats), cutting)
    if cutting.tail:
        # A document's number of characters, 8 bytes each, is all that is held between the two passes.
        lengths = _lengths(_split(read_parts(file, reading), cutting))
        parts = _hold_out_tails(parts, lengths, cutting.tail, file)
    for part in parts:
        yield part._replace(held_out=True) if file.held_out else part


def split_text(chunks: Iterable[str], pattern: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """Cuts one text, which comes in chunks, at the matches of `pattern`.

    A match begins a new piece. White space at its beginning stays with the piece before, so that a match of nothing but
    white space ends that piece.

    In a text of several chunks a match of more than `WINDOW` characters, what it looks at included, may be missed. The
    memory that is needed is about a chunk and two windows.

    Yields (text, begins): the text in order, none of it empty, and whether a piece begins with it.
    """
    held, begins = "", True
    # Positions in `held`: where the piece begins, what has been yielded, and where to search for the next match.
    start = yielded = search = 0
    for chunk, _, ended in with_ends(chunks):
        held += chunk
        limit = len(held) if ended else len(held) - WINDOW
        while (match := _search(pattern, held, search)) and match.end() <= limit:
            # After an empty match the search goes on behind the next character.
            search = match.end() + (match.end() == match.start())
            cut = _cut_of(match)
            if start < cut < len(held):
                if yielded < cut:
                    yield held[yielded:cut], begins
                start = yielded = cut
                begins = True
            if search > len(held):
                break
        safe = min(limit, match.start()) if match else limit
        if yielded < safe:
            yield held[yielded:safe], begins
            yielded, begins = safe, False
        search = max(search, safe)
        # What was yielded is kept as far as a pattern may look back.
        dropped = max(min(yielded, search) - WINDOW, 0)
        held = held[dropped:]
        start, yielded, search = start - dropped, yielded - dropped, search - dropped
    if yielded < len(held):
        yield held[yielded:], begins


def _search(pattern: re.Pattern[str], text: str, start: int) -> re.Match[str] | None:
    """The first match from `start` on. Raises UserError if it is not found within `SEARCH_SECONDS`.

    With some patterns, such as `(a+)+$`, the time grows exponentially with the length of the text. Only an alarm of the
    system can interrupt a search, and only in the main thread, so in other threads there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return pattern.search(text, start)

    def give_up(*_: object) -> None:
        raise UserError(
            f"data.split_on={pattern.pattern!r} was searched for in {len(text) - start:,} characters for more than "
            f"{SEARCH_SECONDS:g} s: bound what it repeats, as in .{{1,80}}, and repeat nothing that repeats itself"
        )

    handler = signal.signal(signal.SIGALRM, give_up)
    # Whoever set an alarm before gets it back, later by the time of this search.
    left, interval = signal.setitimer(signal.ITIMER_REAL, SEARCH_SECONDS)
    try:
        return pattern.search(text, start)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


def _cut_of(match: re.Match[str]) -> int:
    """Where a match cuts: before its first character that is no white space, or at its end if there is none."""
    text = match.group()
    return match.end() - len(text.lstrip())


def _split(parts: Iterator[RecordPart], cutting: Cutting) -> Iterator[RecordPart]:
    """Cuts every document at the matches of `split_on`; `a.txt` becomes `a.txt#1`, `a.txt#2` and so on."""
    if not cutting.split_on:
        yield from parts
        return
    pattern = compile_split_on(cutting.split_on)
    for part in parts:
        name, field = part.record.name, next(iter(part.record.fields))
        number, held = 0, None
        for text, begins in split_text(chunks_of(part, parts), pattern):
            if held is not None:
                yield held._replace(last=begins)
            number += begins
            held = RecordPart(Record(f"{name}#{number}", {field: text}), begins, True)
        if held is not None:
            yield held


def _lengths(parts: Iterator[RecordPart]) -> array.array[int]:
    """The number of characters of each document."""
    lengths = array.array("q")
    for part in parts:
        if part.first:
            lengths.append(0)
        lengths[-1] += len(part.record.text)
    return lengths


def _hold_out_tails(
    parts: Iterator[RecordPart], lengths: array.array[int], fraction: float, file: SourceFile
) -> Iterator[RecordPart]:
    """Cuts every document of n characters after its first int(n * (1 - fraction)); what follows is held out."""
    number, cut, at = -1, 0, 0
    for part in parts:
        if part.first:
            number, at = number + 1, 0
            cut = int(lengths[number] * (1 - fraction)) if number < len(lengths) else 0
        (field, text), name = next(iter(part.record.fields.items())), part.record.name
        assert isinstance(text, str)
        stop = at + len(text)
        if part.last and (number >= len(lengths) or stop != lengths[number]):
            raise UserError(
                f"data.sources: the file {file.path!r} changed while it was read; start again when nothing writes to it"
            )
        if at < cut:
            yield RecordPart(Record(name, {field: text[: cut - at]}), part.first, stop >= cut)
        if stop > cut:
            tail = Record(name + TAIL, {field: text[max(cut - at, 0) :]})
            yield RecordPart(tail, at <= cut, part.last, held_out=True)
        at = stop
