"""A wish to stop: SIGTERM (a preemption notice, a time limit) or Ctrl-C, agreed upon by all processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import jax

from llmjax.parallel import hosts

Item = TypeVar("Item")


class Stopped(BaseException):
    """The work was left because somebody wished to stop; nothing that was saved is harmed.

    Not an Exception, like KeyboardInterrupt: what handles failures must not take it for one.
    """


class StopRequest:
    """A context manager within which SIGTERM and a first Ctrl-C ask to stop; a second interrupts at once.

    Outside the main thread, where Python allows no handlers, only `ask` asks for anything.
    """

    def __init__(self):
        self._asked = False
        self._raises = False
        self._vote: jax.Array | bool | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ask(self) -> None:
        """Asks to stop, as a signal does."""
        self._asked = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a wish to stop raises `Stopped` there and then: for work that leaves nothing to save."""
        self._raises = True
        try:
            if self._asked:
                raise Stopped
            yield
        finally:
            self._raises = False

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
        if self._raises:
            raise Stopped
        # Not print: the handler may have interrupted one.
        os.write(2, b"\nstopping after this step and a checkpoint; Ctrl-C interrupts at once\n")
