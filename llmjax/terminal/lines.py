"""What a person reads in the terminal outside of the training loop: lines, tables, and bars for stages before it."""

from __future__ import annotations

import sys
import time

from llmjax.escapes import show
from llmjax.parallel import hosts
from llmjax.quantities import format_bytes, format_duration
from llmjax.terminal.bar import Bar


def say(text: str = "") -> None:
    """Prints `text`, on the first process only."""
    if hosts.is_primary():
        show(text)


def format_table(rows: dict[str, str]) -> str:
    """Aligned lines of label and text."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {label:<{width}}  {text}" for label, text in rows.items())


def indent(text: str) -> str:
    """`text` as a quotation: a vertical line before each of its lines."""
    return "\n".join(f"  | {line}" for line in text.split("\n"))


class StageProgress:
    """A context manager that shows the progress of stages that read or write bytes: `progress(stage, bytes done,
    bytes in all)`.

    Each stage has its own bar, which vanishes when the stage ends. Nothing is shown if standard error is not a
    terminal, or on processes other than the first.
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
            # The remaining time, if bytes keep their average speed so far.
            left = (time.monotonic() - self._began) * (total - done) / done
            after += f"  ETA {format_duration(max(left, 0))}"
        self._bar.show(done, before, after)
