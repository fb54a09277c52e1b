"""Prints text so that no character in it can control the terminal that shows it.

Names of files, prompts and the text of a model may hold characters that a terminal obeys: to clear the screen, to
rename its window, to turn the direction of a line around. Where a person looks they are shown as escapes. Into a file
or a pipe goes the text as it is.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Control characters of both kinds (C0 and C1) but for tabs and the ends of lines; what changes the direction of text;
# separators of lines; lone surrogates, which stand for bytes that are not UTF-8.
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)
LONG_WORD = re.compile(r"\S{400,}")


def printable(text: str) -> str:
    """`text` with an escape, such as \\x1b, for what a terminal would obey; ends of lines and tabs stay."""
    return CONTROL_CHARACTERS.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """`text` on one line, with its longest words cut: what an error says, whatever value it shows."""
    text = LONG_WORD.sub(lambda word: f"{word[0][:200]}...{word[0][-100:]}", text)
    return text.replace("\n", "\\n").replace("\r", "\\r")


def show(text: str, *, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints `text` to `file` (standard output) at once: with escapes on a terminal, elsewhere as it is.

    What the encoding of `file` cannot express is shown as escapes too.
    """
    file = sys.stdout if file is None else file
    text = printable(text) if file.isatty() else text
    try:
        print(text, end=end, file=file, flush=True)
    except UnicodeEncodeError as error:
        text = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
        print(text, end=end, file=file, flush=True)


def complain(text: str) -> None:
    """Prints what went wrong to standard error: one line, behind the name of the program."""
    show(one_line(f"llmjax: {text}"), file=sys.stderr)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
