"""The wall time of a run, over all its parts."""

from __future__ import annotations

import time


class Clock:
    """Measures the wall time of a run, and of each update that follows the one before without a pause.

    seconds  the time that earlier parts of the run took
    """

    def __init__(self, seconds: float):
        self._begin = time.perf_counter() - seconds
        self._lap: float | None = None

    def total(self) -> float:
        """Seconds that the run has taken, over all its parts."""
        return time.perf_counter() - self._begin

    def lap(self) -> float | None:
        """Seconds since the last call or `restart`; None at the first call and after `forget`."""
        now, last = time.perf_counter(), self._lap
        self._lap = now
        return None if last is None else now - last

    def forget(self) -> None:
        """Makes the next `lap` None, because its time goes into compilation or a profile."""
        self._lap = None

    def restart(self) -> None:
        """Begins a new lap after a pause for saving and evaluation, so that the pause counts for no update."""
        self._lap = time.perf_counter()
