"""The desk: who may come in, what is open, and how an open request ends. It lives in the event loop of the server."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from llmjax.generate.engine import Engine
from llmjax.serve.asked import Asked, Served
from llmjax.serve.config import LOOPBACK
from llmjax.serve.errors import ApiError
from llmjax.serve.fields import Fields, read_object
from llmjax.serve.metrics import Counts
from llmjax.serve.worker import FAILED, Piece, Ticket, Worker

Result = TypeVar("Result")
# The seconds that the body of a request may take to come. A choice.
BODY_SECONDS = 30.0


class Gone(Exception):
    """The client left."""


class Desk:
    """What the handlers of requests share.

    counts    for `/metrics`
    stopping  whether nothing new is begun, because the server was told to stop
    failed    whether the thread that computes has ended with an error
    """

    def __init__(self, served: Served, engine: Engine, worker: Worker, api_key: str):
        self.served, self.worker, self.counts = served, worker, Counts()
        self.stopping = self.failed = False
        # Headers are bytes, which starlette reads as Latin-1.
        self._engine, self._api_key = engine, api_key.strip().encode()
        self._numbers = itertools.count()
        # Tokenizers and templates are used by one thread at a time.
        self._reading = asyncio.Lock()
        self._open: set[Ticket] = set()

    @property
    def num_open(self) -> int:
        """The texts that somebody waits for."""
        return len(self._open)

    def check_host(self, request: Request) -> None:
        """A server for this machine alone answers to no other name: otherwise a page of a stranger whose name leads to
        this address could read the answers in a browser (DNS rebinding)."""
        config = self.served.config
        host = request.headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        if config.is_local and name.lower() not in LOOPBACK:
            raise ApiError(403, f"the Host {name[:60]!a} is not this machine; use http://{config.host}")

    def check_key(self, request: Request) -> None:
        """ApiError without the key that LLMJAX_API_KEY asks for."""
        if not self._api_key:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self._api_key):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def check_open(self) -> None:
        """ApiError where nothing new is begun."""
        if self.failed:
            raise ApiError(500, "the server has failed, and its log says how; start it again")
        if self.stopping:
            raise ApiError(503, "the server is stopping; ask another one, or this one later")

    async def read_body(self, request: Request) -> Fields:
        """The fields of a request, whose body is read no further than serve.max_body_bytes."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A form of a page of a stranger cannot send this type without asking first.
        if kind != "application/json":
            raise ApiError(
                415, f"the content type {kind[:60]!a} is not application/json; send JSON, and say so"
            )
        most = self.served.config.max_body_bytes
        too_large = ApiError(413, f"the body has more than serve.max_body_bytes={most:,} bytes; send less")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"the body took longer than {BODY_SECONDS:g} seconds; send it at once"
            ) from None
        except ClientDisconnect:
            raise Gone from None
        # Large bodies take a while, in which others want to be served.
        return await self.aside(read_object, bytes(body))

    async def aside(self, function: Callable[..., Result], *arguments: object) -> Result:
        """The result of a function that takes a while, in which others are served; one at a time."""
        async with self._reading:
            return await asyncio.to_thread(function, *arguments)

    def new_seed(self) -> int:
        """The seed of a request that has none: generate.seed for the first one, and another for each that follows."""
        return (self.served.defaults.seed + next(self._numbers)) % 2**63

    @contextlib.contextmanager
    def texts(self, asked: Asked) -> Iterator[asyncio.Queue[tuple[int, Piece]]]:
        """A context manager in which the texts of a request are written; gives the queue of their pieces.

        They lose their slots where it ends, for whatever reason. ApiError if too many texts wait already.
        """
        self.check_open()
        config = self.served.config
        most = config.slots + config.max_queue
        if self.num_open + len(asked.orders) > most:
            raise ApiError(
                429,
                f"{self.num_open} texts are written or wait, of at most {most}; try again soon",
                code="queue_full",
            )
        for order in asked.orders:
            self._engine.check(order)
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        tickets = [
            self.worker.submit(order, asked.stops, continues, pieces, index)
            for index, (order, continues) in enumerate(zip(asked.orders, asked.continues, strict=True))
        ]
        self._open.update(tickets)
        self.counts.prompt_tokens += asked.prompt_tokens
        try:
            yield pieces
        finally:
            self._open.difference_update(tickets)
            for ticket in tickets:
                self.worker.leave(ticket)

    async def pieces(
        self, asked: Asked, queue: asyncio.Queue[tuple[int, Piece]], started: float
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Yields (index, piece) until all texts of a request have ended. ApiError if they cannot."""
        left, first = len(asked.orders), True
        while left:
            index, piece = await queue.get()
            if piece.end == FAILED:
                self.check_open()
                raise ApiError(500, "the server has failed, and its log says how; start it again")
            if piece.tokens and first:
                self.counts.first_token_seconds.add(time.monotonic() - started)
                first = False
            self.counts.new_tokens += len(piece.tokens)
            left -= bool(piece.end)
            yield index, piece

    def end_all(self) -> None:
        """Ends every text that is open, which its client is told."""
        for ticket in self._open:
            ticket.pieces.put_nowait((ticket.index, Piece("", (), FAILED)))


async def until_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves: then it raises Gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watching, working = asyncio.ensure_future(watch()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)
