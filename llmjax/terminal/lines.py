"""What a person reads in the terminal outside the training loop: lines, tables, and bars for the stages before it."""

from __future__ import annotations

import sys
import time

from llmjax.escapes import show
from llmjax.parallel import hosts
from llmjax.quantities import format_bytes, format_duration
from llmjax.terminal.bar import Bar


def say(text: str = "") -> None:
    """Prints `text`, once for all processes."""
    if hosts.is_primary():
        show(text)


def format_table(rows: dict[str, str]) -> str:
    """Aligned lines of label and text."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {label:<{width}}  {text}" for label, text in rows.items())


def indent(text: str) -> str:
    """`text` as a quotation: every line of it behind a vertical line."""
    return "\n".join(f"  | {line}" for line in text.split("\n"))


class StageProgress:
    """Shows how far each stage is that reads or writes bytes: `progress(stage, bytes done, bytes in all)`.

    Each stage has a bar of its own, which vanishes when the stage ends. Nothing is shown where standard error is no
    terminal, and by processes other than the first. A context manager.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Bar | None = None
        self._began = 0.0

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not (hosts.is_primary() and sys.stderr.isatty()):
            return
        before, after = (
            f"{stage} {done / max(total, 1):4.0%}",
            f"{format_bytes(done)} of {format_bytes(total)}",
        )
        if self._bar is None or stage != self._stage:
            self.__exit__()
            self._bar = Bar(total, before, after, stays=False)
            self._stage, self._began = stage, time.monotonic()
        if done:
            left = (time.monotonic() - self._began) * (total - done) / done
            after += f"  ETA {format_duration(max(left, 0))}"
        self._bar.show(done, before, after)
