"""Prints text so that no character in it can control the terminal.

File names, prompts and generated text may contain characters that a terminal obeys: to clear the screen, rename its
window, or reverse the direction of a line. On a terminal they are shown as escapes. Files and pipes get the text
unchanged.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# The characters that a terminal obeys: control characters (C0 and C1, except for tab and newline), characters that
# change the direction of text, separators of lines and paragraphs, and lone surrogates, which stand for bytes that
# are not UTF-8.
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)
# The codes that turn a text green on a terminal, and back.
GREEN = ("\x1b[32m", "\x1b[39m")
# Words of 400 characters or more are shortened in error messages. A choice.
LONG_WORD = re.compile(r"\S{400,}")


def printable(text: str) -> str:
    """`text` with an escape, such as \\x1b, for each character that a terminal would obey. Newlines and tabs stay."""
    return CONTROL_CHARACTERS.sub(lambda found: _escape(found[0]), text)


def escape_surrogates(text: str) -> str:
    """`text` with escapes for lone surrogates, which stand for bytes that are not UTF-8 and which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """`text` on a single line, with very long words shortened, for error messages that quote a value."""
    text = LONG_WORD.sub(lambda word: f"{word[0][:200]}...{word[0][-100:]}", text)
    return escape_breaks(text)


def escape_breaks(text: str, tabs: bool = False) -> str:
    """`text` with \\n and \\r, and with `tabs` also \\t, for what would end a line or a column of the output."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text.replace("\t", "\\t") if tabs else text


def show_marked(text: str, marks: tuple[str, str]) -> None:
    """Prints `text` to standard output, with what is between the marks green on a terminal and in [[ ]] elsewhere."""
    on_terminal = sys.stdout.isatty()
    text = printable(text) if on_terminal else text
    for mark, shown in zip(marks, GREEN if on_terminal else ("[[", "]]"), strict=True):
        text = text.replace(mark, shown)
    _print(text, sys.stdout, "\n")


def show(text: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints `text` to `file` (by default standard output) and flushes it; with escapes if `file` is a terminal.

    Characters that the encoding of `file` lacks are also shown as escapes.
    """
    # Looked up here and not as the default, because tests and notebooks replace sys.stdout.
    file = sys.stdout if file is None else file
    _print(printable(text) if file.isatty() else text, file, end)


def _print(text: str, file: TextIO, end: str) -> None:
    try:
        print(text, end=end, file=file, flush=True)
    except UnicodeEncodeError as error:
        text = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
        print(text, end=end, file=file, flush=True)


def complain(text: str) -> None:
    """Prints an error to standard error, as one line that begins with the name of the program."""
    show(one_line(f"llmjax: {text}"), file=sys.stderr)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
