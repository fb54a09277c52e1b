"""A wish to stop: SIGTERM (a preemption notice, a time limit) or Ctrl-C, agreed upon by all processes."""

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
# The same items one by one, as `StopRequest.watch` gives them; `Stopped` between two of them.
Watch = Callable[[Iterable[Any]], Iterator[Any]]


class Stopped(BaseException):
    """The work was left because somebody wished to stop; nothing that was saved is harmed.

    Not an Exception, like KeyboardInterrupt: what handles failures must not take it for one.
    """


# Exit codes. 75 is EX_TEMPFAIL of sysexits.h, "try again later": what queues of jobs restart. The others are those
# that shells give to processes that these signals end.
STOPPED, INTERRUPTED, OUTPUT_CLOSED, TERMINATED = 75, 130, 141, 143
# Seconds that an interrupted process gets to end in good order before it is ended where it stands.
PATIENCE = 2.0


class StopRequest:
    """A context manager within which SIGTERM and a first Ctrl-C ask to stop; a second interrupts at once.

    `at_once`: a wish to stop raises `Stopped` there and then, but within `deferred`: for work that leaves nothing to
    save. Several processes always wait until they have agreed. Outside the main thread, where Python allows no
    handlers, only `ask` asks for anything.

    exit_code  what a process that was stopped exits with
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
        """Asks to stop, as a signal does."""
        self._asked, self.exit_code = True, exit_code

    @contextlib.contextmanager
    def deferred(self) -> Iterator[StopRequest]:
        """Within it a wish to stop is only taken note of, for `poll` to tell."""
        before, self._raises = self._raises, False
        try:
            yield self
        finally:
            self._raises = before

    def poll(self) -> bool:
        """Whether to stop now; every process calls this equally often and gets the same answer.

        On several processes the answer is that of the vote begun at the last call, which is there by now,
        so that nothing waits.
        """
        if jax.process_count() == 1:
            return self._asked
        vote, self._vote = self._vote, hosts.start_vote(self._asked)
        return vote is not None and bool(vote)

    def check(self) -> None:
        """Polls, and raises `Stopped` where to stop."""
        if self.poll():
            raise Stopped

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, before each of which it is checked whether to stop."""
        for item in items:
            self.check()
            yield item

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._raises and jax.process_count() == 1:
            raise Stopped
        # Not print: the handler may have interrupted one.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step and a checkpoint; Ctrl-C interrupts at once\n")


def end_on_second_interrupt() -> None:
    """Makes a second Ctrl-C end the process within `PATIENCE` seconds, whatever it is doing.

    Python's own handlers run only between two of its instructions, so that Ctrl-C would have to wait for a compiler
    or a device. What is being written is written under another name and is not harmed.
    """
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
