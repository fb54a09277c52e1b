"""A progress bar on a terminal: text, a bar as long as there is room, more text. No other file knows tqdm."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

# Columns and lines of a terminal that does not say how large it is: the size of the VT100, which is still the default.
UNKNOWN_SIZE = 80, 24
# The least columns that the bar itself takes, with the lines at its ends and the spaces around them.
BAR_COLUMNS = 5


class Bar:
    """A bar on standard error that counts to `total`, and stands between two texts. Bars made while others are shown
    stand below them.

    The second text comes in parts. Where the terminal is too narrow for all of them the last part stays, and the ones
    before it are left out, from the last but one to the first, and then the bar itself.

    total  what the bar counts to; 0: there is no bar, only the texts
    stays  whether its last state remains on the screen after `close`
    """

    def __init__(self, total: int, before: str, after: Sequence[str] = (), *, stays: bool):
        # With a size of 0, tqdm would draw nothing at all.
        width, height = _fixed_size()
        self._total = total
        self._tqdm = tqdm(
            total=total,
            ncols=width,
            nrows=height,
            dynamic_ncols=width is None,
            leave=stays,
            bar_format=_look(before, after, total, width or _columns()),
        )

    def show(self, done: int, before: str, after: Sequence[str]) -> None:
        """Draws the bar at `done`, between two texts. It redraws at most ten times a second, and where it is full."""
        bar = self._tqdm
        bar.bar_format = _look(before, after, self._total, bar.ncols or _columns())
        if not bar.update(done - bar.n) and done >= self._total:
            bar.refresh()

    def close(self) -> None:
        """Gives the terminal back."""
        self._tqdm.close()


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """Takes every bar off the screen for a while, so that a line printed meanwhile stands above them."""
    with tqdm.external_write_mode(file=sys.stdout):
        yield


def _look(before: str, after: Sequence[str], total: int, width: int) -> str:
    """The bar's format for tqdm, in which braces of the texts stand for themselves."""
    after = [text for text in after if text]
    room = width - len(before) - (BAR_COLUMNS if total else 2)
    while len(after) > 1 and len("  ".join(after)) > room:
        del after[-2]
    text = "  ".join(after)
    has_bar = total > 0 and len(text) <= room
    before, text = (part.replace("{", "{{").replace("}", "}}") for part in (before, text))
    return f"{before} |{{bar}}| {text}" if has_bar else f"{before}  {text}"


def _columns() -> int:
    """The columns of the terminal, as wide as can be where standard error is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, AttributeError):
        return 1000


def _fixed_size() -> tuple[int, int] | tuple[None, None]:
    """Columns and lines where the terminal does not know both of them; Nones where it does, and may change them.

    Some pseudo-terminals say 0 columns or 0 lines, or both. The other number then still counts.
    """
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, AttributeError):
        return None, None
    if min(size) > 0:
        return None, None
    return size.columns or UNKNOWN_SIZE[0], size.lines or UNKNOWN_SIZE[1]
