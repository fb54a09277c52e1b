"""The display of a training run: on a terminal a bar with loss, tokens/s and remaining time, otherwise plain lines.

A bar in a log file would be noise. A file or pipe gets one line at the first update, then at most one line every
`PLAIN_SECONDS`, and one at the last update. Evaluations always get a line.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmjax.escapes import show
from llmjax.quantities import format_duration, format_number
from llmjax.scores.score import Score
from llmjax.terminal.bar import Bar, above_bars

# The least seconds between two plain lines. A choice.
PLAIN_SECONDS = 10.0
# The weight of earlier updates in the tokens/s that are shown. A choice for readability; recorded numbers are not
# smoothed.
SMOOTHING = 0.9


class Progress:
    """The display of a run of `num_tokens` tokens, counted in updates of `tokens_per_update` tokens.

    If the reader of the output is gone (`| head`), it becomes silent and calls `on_closed`, so that the run can end
    properly.
    """

    def __init__(
        self,
        num_tokens: int,
        tokens_per_update: int,
        on_closed: Callable[[], None] = lambda: None,
        scores: Sequence[Score] = (),
    ):
        self._scores = scores
        self._num_tokens, self._unit = num_tokens, tokens_per_update
        self._on_closed = on_closed
        self._shown = False
        self._speed: float | None = None
        self._printed = -PLAIN_SECONDS
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            self._bar = Bar(total := num_tokens // tokens_per_update, f"0/{total}", stays=True)

    def train(self, update: int, values: Mapping[str, Any]) -> None:
        """Shows one update; `values` are the numbers of its line in the metrics file."""
        speed = values.get("tokens_per_second")
        if speed is not None:
            last = self._speed
            self._speed = speed if last is None else SMOOTHING * last + (1 - SMOOTHING) * speed
        text = self._describe(values)
        if self._bar is not None:
            done = values["tokens"] // self._unit
            self._bar.show(done, f"{done}/{self._num_tokens // self._unit}", text)
        elif self._is_due(values["tokens"]):
            self.say("  ".join([self._where(update, values), *text]))

    def evaluate(self, update: int, values: Mapping[str, float]) -> None:
        """Shows the result of an evaluation on a line of its own."""
        labels = {score.name: score.label.removeprefix("held-out ") for score in self._scores}
        parts = [f"{label} {values[name]:.4f}" for name, label in labels.items() if name in values]
        self.say(f"{self._where(update, values)}  held-out " + "  ".join(parts))

    def _where(self, update: int, values: Mapping[str, float]) -> str:
        """`update 3/400`, or `update 3, 1% of the tokens` if updates have had other sizes."""
        if values["tokens"] == update * self._unit:
            return f"update {update}/{self._num_tokens // self._unit}"
        return f"update {update}, {values['tokens'] / max(self._num_tokens, 1):.0%} of the tokens"

    def say(self, text: str) -> None:
        """Prints `text` above the bar."""
        try:
            with above_bars():
                show(text)
        except BrokenPipeError:
            silence()
            self._on_closed()

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        if self._bar is not None:
            self._bar.close()

    def _is_due(self, tokens: float) -> bool:
        now, is_first = time.monotonic(), not self._shown
        if now - self._printed < PLAIN_SECONDS and not is_first and tokens < self._num_tokens:
            return False
        self._printed, self._shown = now, True
        return True

    def _describe(self, values: Mapping[str, float]) -> list[str]:
        parts = [f"loss {values['loss']:.4f}"]
        if self._speed:
            left = (self._num_tokens - values["tokens"]) / self._speed
            speed = f"{format_number(self._speed)} tokens/s"
            # Speed next to last: on a narrow terminal it is the first to be left out, and the ETA stays.
            parts += [speed, f"ETA {format_duration(max(left, 0))}"]
        return parts


def silence() -> None:
    """Redirects standard output to nowhere; otherwise Python would complain at exit about a closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
