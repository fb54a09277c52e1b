"""What a person reads in the terminal outside of the training loop: lines and tables."""

from __future__ import annotations

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


def indent(text: str) -> str:
    """`text` as a quotation: a vertical line before each of its lines."""
    return "\n".join(f"  | {line}" for line in text.split("\n"))
