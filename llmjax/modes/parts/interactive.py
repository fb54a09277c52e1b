"""`--mode=generate --interactive`: continues prompts line by line, with a checkpoint that is loaded once.

On a terminal, the standard module readline gives the line that is typed its editing and its history. Elsewhere the
lines come from a pipe or a file, empty ones are skipped, and the output is what `--prompt_file` prints for the same
lines.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from llmjax.errors import UserError
from llmjax.escapes import complain, show
from llmjax.train.loop.stop_request import Watch, uncounted_interrupts

# What stands before a line that is typed.
MARK = "> "
HINT = "an empty line or Ctrl-D ends, Ctrl-C stops a text"


class Leave(Exception):
    """Raised by `write` for a line that asks to leave."""


def converse(write: Callable[[int, str, Watch], None], hint: str = HINT, empty_ends: bool = True) -> None:
    """Reads lines from standard input and has each continued, until the end of the input or a typed empty line.

    write       called with the number of a line, counted from 0, the line, and a watch that ends its text where Ctrl-C
                asks for it; prints the text. It may raise `Leave`
    hint        what is said at first on a terminal
    empty_ends  whether a typed empty line ends; otherwise it is passed over
    """
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        # Importing it is enough: from then on it edits what `input` reads. Some systems lack it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        show(hint)
    with uncounted_interrupts():
        for number in itertools.count():
            line = _typed_line(hint, empty_ends) if typed else _piped_line(number)
            if not line:
                return
            try:
                with _Interruptible() as text:
                    write(number, line, text.watch)
            except Leave:
                return
            except UserError as error:
                # A prompt that is too long is no reason to load the checkpoint again.
                complain(str(error))


def _typed_line(hint: str, empty_ends: bool) -> str:
    """The next line that is typed; "" at the end."""
    while True:
        try:
            if (line := input(MARK)) or empty_ends:
                return line
        except EOFError:
            show("")
            return ""
        except KeyboardInterrupt:
            # It came between two texts, perhaps a moment late. The line that was begun is dropped, as a shell does it.
            show(f"\n{hint}")
        except UnicodeDecodeError:
            complain("the line is not text in the encoding of this terminal; type it again")


def piped_lines() -> Iterator[str]:
    """The lines of standard input that are not empty, without their ends."""
    for number in itertools.count():
        if not (line := _piped_line(number)):
            return
        yield line


def _piped_line(number: int) -> str:
    """The next line of standard input that is not empty, without its end; "" where there is none."""
    while data := sys.stdin.buffer.readline():
        try:
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(
                f"prompt {number + 1} of standard input is not UTF-8 at byte {error.start}; correct it"
            ) from None
        text = text if number else text.removeprefix("\ufeff")
        if text:
            return text
    return ""


class _Interruptible:
    """A context manager within which a first Ctrl-C ends a text, and a second one interrupts the program."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> _Interruptible:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def watch(self, items: Iterable) -> Iterator:
        """Passes `items` on until Ctrl-C."""
        return itertools.takewhile(lambda _: not self._asked, items)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
