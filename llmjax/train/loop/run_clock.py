"""The wall time of a run, over all its parts."""

from __future__ import annotations

import time


class Clock:
    """Wall time of the run, and of single updates where they followed one another without a pause."""

    def __init__(self, seconds: float):
        self._begin = time.perf_counter() - seconds
        self._lap: float | None = None

    def total(self) -> float:
        """Seconds since the run began, in all its parts."""
        return time.perf_counter() - self._begin

    def lap(self) -> float | None:
        """Seconds since the last update ended; None for the first after a start or `forget`."""
        now, last = time.perf_counter(), self._lap
        self._lap = now
        return None if last is None else now - last

    def forget(self) -> None:
        """Leaves the current lap out, because its time goes into compilation."""
        self._lap = None

    def restart(self) -> None:
        """Begins a new lap after a pause, whose time went into evaluation and saving."""
        self._lap = time.perf_counter()
