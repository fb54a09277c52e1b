"""The one thread that computes: it runs the engine, and tells the event loop of the server what is written.

Everything that the thread keeps is touched by the thread alone. The event loop sends it functions to call between two
steps, and gets `Piece`s back. So a text that nobody waits for any more has lost its slot before the next token.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.generate.engine import Engine, Event, Order, PromptRead, Score
from llmjax.generate.text import StoppedText

Result = TypeVar("Result")
# The end of a text that the server cannot finish.
FAILED = "failed"


class Piece(NamedTuple):
    """What is new of a text.

    text    characters that may be sent
    tokens  the new ids with their scores; their characters may come with a later piece
    end     "" if the text goes on, "stop" or "length" at its end, FAILED if the server cannot go on
    prompt  the scores of the prompt, where they are asked for, in the first piece
    """

    text: str
    tokens: tuple[tuple[int, Score], ...]
    end: str
    prompt: tuple[Score, ...] = ()


@dataclasses.dataclass(eq=False)
class Ticket:
    """A text that was asked for.

    pieces  where its pieces go, with `index` beside each: the texts of one request share a queue
    number  that of the engine, once it has one
    left    whether nobody waits for it any more
    """

    order: Order
    text: StoppedText
    pieces: asyncio.Queue[tuple[int, Piece]]
    index: int
    number: int = 0
    left: bool = False


class Worker(threading.Thread):
    """Runs `engine` until `stop`. All other methods are called from the event loop.

    failure  what ended the thread, if it did not end as it was told to
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, loop: asyncio.AbstractEventLoop):
        super().__init__(name="llmjax engine", daemon=True)
        self._engine, self._tokenizer, self._loop = engine, tokenizer, loop
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._stopped = False
        self.failure: BaseException | None = None
        # Called in the event loop when the thread fails.
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def num_used(self) -> int:
        """The slots in use."""
        return self._engine.num_used

    @property
    def num_waiting(self) -> int:
        """The texts that wait for a slot."""
        return self._engine.num_waiting

    def submit(
        self,
        order: Order,
        stops: tuple[str, ...],
        continues: bool,
        pieces: asyncio.Queue[tuple[int, Piece]],
        index: int,
    ) -> Ticket:
        """Asks for a text, whose pieces come to `pieces`. `Engine.check` must have let the order through."""
        ticket = Ticket(order, StoppedText(self._tokenizer, stops, continues), pieces, index)
        self._mail.put(lambda: self._begin(ticket))
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Forgets a text that nobody waits for any more; one that has ended is no mistake."""
        ticket.left = True
        self._mail.put(lambda: self._forget(ticket))

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function, which the thread calls between two steps."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                result = function()
            except Exception as error:
                self._tell(_fail, future, error)
            else:
                self._tell(_resolve, future, result)

        self._mail.put(run)
        return await future

    def stop(self) -> None:
        """Ends the thread after the present step. What is still written gets no more pieces."""

        def end() -> None:
            self._stopped = True

        self._mail.put(end)

    def run(self) -> None:
        try:
            while not self._stopped:
                # An idle engine waits for mail.
                self._read_mail(wait=self._engine.is_idle)
                if not (self._stopped or self._engine.is_idle):
                    for event in self._engine.step():
                        self._hand_out(event)
        except BaseException as error:
            self.failure = error
            for ticket in self._tickets.values():
                self._send(ticket, Piece("", (), FAILED))
            self._tell(self.on_failure)

    def _read_mail(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._mail.get(block=wait)()
                wait = False

    def _begin(self, ticket: Ticket) -> None:
        if not ticket.left:
            ticket.number = self._engine.submit(ticket.order)
            self._tickets[ticket.number] = ticket

    def _forget(self, ticket: Ticket) -> None:
        self._engine.cancel(ticket.number)
        self._tickets.pop(ticket.number, None)

    def _hand_out(self, event: Event) -> None:
        ticket = self._tickets.get(event.order)
        if ticket is None:
            return
        if isinstance(event, PromptRead):
            if event.scores:
                self._send(ticket, Piece("", (), "", event.scores))
            return
        text, end = "", event.end
        tokens: tuple[tuple[int, Score], ...] = ()
        if event.token is not None and event.score is not None:
            text, tokens = ticket.text.push(event.token), ((event.token, event.score),)
        if end:
            text += ticket.text.flush()
        if ticket.text.stopped:
            end = "stop"
        if end:
            # A text that was stopped goes on for the engine, which must forget it.
            self._forget(ticket)
        self._send(ticket, Piece(text, tokens, end))

    def _send(self, ticket: Ticket, piece: Piece) -> None:
        self._tell(ticket.pieces.put_nowait, (ticket.index, piece))

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function in the event loop, if that is still there."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _resolve(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
