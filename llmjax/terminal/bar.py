"""A progress bar on a terminal: text, a bar as long as there is room, more text. No other file knows tqdm."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from tqdm import tqdm

# Columns and lines of a terminal that does not say how large it is: the size of the VT100, which is still the default.
UNKNOWN_SIZE = 80, 24


class Bar:
    """A bar on standard error that counts to `total`, and stands between two texts.

    stays  whether its last state remains on the screen after `close`
    """

    def __init__(self, total: int, before: str, after: str = "", *, stays: bool):
        # With a size of 0, tqdm would draw nothing at all.
        width, height = (None, None) if (has_size := _has_size()) else UNKNOWN_SIZE
        look = _look(before, after)
        self._tqdm = tqdm(
            total=total, ncols=width, nrows=height, dynamic_ncols=has_size, leave=stays, bar_format=look
        )

    def show(self, done: int, before: str, after: str) -> None:
        """Draws the bar at `done`, between two texts. tqdm redraws at most ten times a second."""
        self._tqdm.bar_format = _look(before, after)
        self._tqdm.update(done - self._tqdm.n)

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Takes the bar off the screen for a while, so that a line printed meanwhile stands above it."""
        with self._tqdm.external_write_mode(file=sys.stdout):
            yield

    def close(self) -> None:
        """Gives the terminal back."""
        self._tqdm.close()


def _look(before: str, after: str) -> str:
    """The bar's format for tqdm, in which braces of the texts stand for themselves."""
    before, after = (text.replace("{", "{{").replace("}", "}}") for text in (before, after))
    return f"{before} |{{bar}}| {after}"


def _has_size() -> bool:
    """Whether the terminal knows how large it is. Some pseudo-terminals say 0 columns and 0 lines."""
    try:
        return min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, AttributeError):
        return True
