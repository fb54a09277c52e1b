"""What a person reads in the terminal outside the training loop: lines, tables, and bars for the stages before it."""

from __future__ import annotations

import sys

from tqdm import tqdm

from llmjax.escapes import show
from llmjax.parallel import hosts


def say(text: str = "") -> None:
    """Prints `text`, once for all processes."""
    if hosts.is_primary():
        show(text)


def format_table(rows: dict[str, str]) -> str:
    """Aligned lines of label and text."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {label:<{width}}  {text}" for label, text in rows.items())


def indent(text: str) -> str:
    """`text` behind a bar, every line of it."""
    return "\n".join(f"  | {line}" for line in text.split("\n"))


class StageProgress:
    """A bar per stage on a terminal, nothing elsewhere: `progress(stage, done, total)`. A context manager."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm | None = None

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not (hosts.is_primary() and sys.stderr.isatty()):
            return
        bar = self._bar
        if bar is None or stage != self._stage:
            self.__exit__()
            self._stage = stage
            self._bar = bar = tqdm(
                total=total,
                desc=stage,
                unit="B",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} ETA {remaining}",
            )
        bar.update(done - bar.n)
