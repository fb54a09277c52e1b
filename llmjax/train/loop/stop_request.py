"""Requests to stop a run: SIGTERM (a preemption notice, a time limit) or Ctrl-C. All processes agree on when."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax

from llmjax.parallel import hosts

Item = TypeVar("Item")
# The type of `StopRequest.watch`, which passes items on and may raise `Stopped` before any of them.
Watch = Callable[[Iterable[Any]], Iterator[Any]]


class Stopped(BaseException):
    """Raised to leave unfinished work because somebody asked to stop. Nothing that was saved is harmed.

    Like KeyboardInterrupt it is no Exception, so that `except Exception` does not take it for a failure.
    """


# Exit codes. 75 is EX_TEMPFAIL of sysexits.h, "try again later", after which job queues restart a job. The others are
# 128 plus the number of the signal SIGINT, SIGPIPE or SIGTERM, as a shell reports a process that it ends.
STOPPED, INTERRUPTED, OUTPUT_CLOSED, TERMINATED = 75, 130, 141, 143
# A choice: the seconds that Python gets to end a twice interrupted process in good order, before it is ended at once.
PATIENCE = 2.0


class StopRequest:
    """A context manager within which SIGTERM and a first Ctrl-C ask to stop. A second Ctrl-C interrupts at once.

    at_once    a signal raises `Stopped` immediately, except within `deferred`: for work that has nothing to save. With
               several processes it never does, because they must agree first
    exit_code  the exit code of a process that was stopped

    Python allows signal handlers only in the main thread. In other threads only `ask` asks to stop.
    """

    def __init__(self, *, at_once: bool = False):
        self.exit_code = STOPPED
        self._asked = False
        self._raises = at_once
        self._vote: jax.Array | bool | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ask(self, exit_code: int = STOPPED) -> None:
        """Asks to stop, as a signal would."""
        self._asked, self.exit_code = True, exit_code

    @contextlib.contextmanager
    def deferred(self) -> Iterator[StopRequest]:
        """Within it a signal is only noted, and `poll` reports it."""
        before, self._raises = self._raises, False
        try:
            yield self
        finally:
            self._raises = before

    def poll(self) -> bool:
        """Whether to stop now. Every process must call this equally often, and all get the same answer.

        With several processes, each call starts a vote and returns the result of the vote that the last call started.
        That result has arrived by then, so nothing waits.
        """
        if jax.process_count() == 1:
            return self._asked
        vote, self._vote = self._vote, hosts.start_vote(self._asked)
        return vote is not None and bool(vote)

    def check(self) -> None:
        """Raises `Stopped` where `poll` says to stop."""
        if self.poll():
            raise Stopped

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Passes `items` on, and raises `Stopped` before one of them where `poll` says to stop."""
        for item in items:
            self.check()
            yield item

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._raises and jax.process_count() == 1:
            raise Stopped
        # os.write and not print: the handler may have interrupted a print, whose buffer cannot be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step and a checkpoint; Ctrl-C interrupts at once\n")


def end_on_second_interrupt() -> None:
    """Makes a second Ctrl-C end the process within `PATIENCE` seconds, whatever it is doing.

    Python runs its signal handlers only between two of its own instructions, so Ctrl-C has to wait while a compiler or
    a device works. Files are safe: each is written under another name until it is whole.
    """
    # The interpreter writes the number of each signal into this pipe at once, and the thread below reads it.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(reader, 1) == bytes([signal.SIGINT])
        time.sleep(PATIENCE)
        with contextlib.suppress(OSError):
            os.write(2, b"\nllmjax: interrupted\n")
        os._exit(INTERRUPTED)

    threading.Thread(target=listen, daemon=True).start()


@contextlib.contextmanager
def uncounted_interrupts() -> Iterator[None]:
    """Within it, `end_on_second_interrupt` does not notice Ctrl-C. It is for work that Ctrl-C does not end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
