"""What a person reads in the terminal outside of the training loop: lines and tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from llmjax.escapes import complain, show
from llmjax.parallel import hosts
from llmjax.terminal.bar import above_bars


def say(text: str = "") -> None:
    """Prints `text`, on the first process only."""
    if hosts.is_primary():
        with above_bars():
            show(text)


def warn(text: str) -> None:
    """Writes a warning to standard error, on the first process only: something is wrong, but the run goes on."""
    if hosts.is_primary():
        with above_bars():
            complain(text)


def format_table(rows: dict[str, str]) -> str:
    """Aligned lines of label and text."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {label:<{width}}  {text}" for label, text in rows.items())


def format_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned lines of a table: the first column is set to the left, and all others to the right."""
    lines = [head, *rows]
    widths = [max(map(display_width, column)) for column in zip(*lines)]

    def line(cells: Sequence[str]) -> str:
        padded = [" " * (width - display_width(cell)) for cell, width in zip(cells, widths)]
        others = (pad + cell for pad, cell in zip(padded[1:], cells[1:]))
        return "  ".join([f"  {cells[0]}{padded[0]}", *others]).rstrip()

    return "\n".join(map(line, lines))


def display_width(text: str) -> int:
    """The columns that `text` takes on a terminal, where Chinese characters and the like take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def indent(text: str) -> str:
    """`text` as a quotation: a vertical line before each of its lines."""
    return "\n".join(f"  | {line}" for line in text.split("\n"))
