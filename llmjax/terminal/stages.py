"""What a run says while it does something that takes seconds and is not an update: reading, compiling, evaluating.

On a terminal a stage has a line of its own, which is redrawn every second and vanishes when the stage ends. A file or
pipe gets a line only about a stage that has lasted for `QUIET_SECONDS`, and then one every `PLAIN_SECONDS`. A thread of
its own draws, because most stages are one long call of a compiler or a library.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from llmjax.escapes import show
from llmjax.quantities import format_bytes, format_duration
from llmjax.terminal.bar import Bar

# How long nothing is said. A choice: longer silences make people wonder.
QUIET_SECONDS = 3.0
# The least seconds between two plain lines about the same stage. A choice.
PLAIN_SECONDS = 10.0
# Seconds between two drawings of a stage on a terminal.
TICK = 1.0
# The least seconds between two drawings of a stage that reports often.
REDRAW = 0.1


class StageProgress:
    """A context manager that shows one stage after the other: `progress(stage, done, total)`.

    Each stage has its own bar, or where `total` is 0 the seconds that it has taken so far. The last stage ends with
    the `with` block. Nothing is shown where `speaks()` is false, as on processes other than the first.

    amount  how `done` and `total` are written; by default as bytes
    """

    def __init__(self, amount: Callable[[int], str] = format_bytes, speaks: Callable[[], bool] | None = None):
        self._amount, self._speaks = amount, speaks or _is_primary
        self._stage, self._done, self._total = "", 0, 0
        self._began = self._due = self._drawn = 0.0
        self._bar: Bar | None = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._close()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Says that `stage` is going on, and that `done` of `total` is done."""
        if not self._speaks():
            return
        with self._lock:
            self._done, self._total = done, total
            if stage != self._stage:
                self._close()
                self._stage, self._began = stage, time.monotonic()
                self._due = self._began + QUIET_SECONDS
            # A stage may report each of a million files, and formatting takes longer than the question for the time.
            is_due = self._bar is None or done >= total or time.monotonic() - self._drawn >= REDRAW
            if is_due and sys.stderr.isatty():
                self._draw()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_talking, daemon=True)
            self._thread.start()

    def _keep_talking(self) -> None:
        # Whoever reads the output may be gone, which the run itself finds out.
        with contextlib.suppress(OSError, ValueError):
            while not self._ended.wait(TICK):
                with self._lock:
                    if sys.stderr.isatty():
                        self._draw()
                    elif time.monotonic() >= self._due:
                        self._due = time.monotonic() + PLAIN_SECONDS
                        before, after = self._texts()
                        show("  ".join([before, *(text for text in after if text)]))

    def _draw(self) -> None:
        before, after = self._texts()
        if self._bar is None:
            self._bar = Bar(self._total, before, after, stays=False)
        self._bar.show(self._done, before, after)
        self._drawn = time.monotonic()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _texts(self) -> tuple[str, tuple[str, ...]]:
        """What stands before and after the bar."""
        seconds = time.monotonic() - self._began
        if not self._total:
            return self._stage, (format_duration(round(seconds)),)
        eta = ""
        if self._done and seconds >= 1:
            # If the average speed so far lasts. That of the first second says too little.
            eta = f"ETA {format_duration(round(seconds * (self._total - self._done) / self._done))}"
        amount = f"{self._amount(self._done)} of {self._amount(self._total)}"
        return f"{self._stage} {self._done / self._total:4.0%}", (amount, eta)


@contextlib.contextmanager
def working(stage: str, speaks: Callable[[], bool] | None = None) -> Iterator[None]:
    """Says what goes on within the `with` block, in which it cannot be told how much is done, where `speaks()`."""
    with StageProgress(speaks=speaks) as progress:
        progress(stage)
        yield


def on_terminal() -> bool:
    """Whether to speak where standard output has nothing but results, which others may read: on a terminal only."""
    return sys.stderr.isatty() and _is_primary()


def _is_primary() -> bool:
    # Imported late: the first stage of a program is the import of jax.
    from llmjax.parallel import hosts

    return hosts.is_primary()
