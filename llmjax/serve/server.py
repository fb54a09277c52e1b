"""Runs the server until it is told to stop, and ends it so that nobody is left without an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmjax.errors import UserError
from llmjax.generate.engine import Engine
from llmjax.serve.app import make_app
from llmjax.serve.asked import Served
from llmjax.serve.config import ServeConfig
from llmjax.serve.desk import Desk
from llmjax.serve.worker import Worker

# How often it is looked whether all texts have ended, in seconds. A choice.
GLANCE = 0.02
# The seconds that the head of a request may take to come. A choice.
HEAD_SECONDS = 30.0
# The most connections at a time, of which idle ones count too. A choice.
CONNECTIONS = 256


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens at the address of the config. UserError if that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        # The errors of looking a name up have numbers of their own.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or error
        raise UserError(
            f"serve.host={config.host!r} with serve.port={config.port} cannot be listened at ({reason}); give another "
            "address, or a port that is free"
        ) from None


class Protocol(H11Protocol):
    """A connection that is closed when its client sends no whole head of a request for `HEAD_SECONDS`: otherwise
    clients that begin a request and never end it could hold every connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waited_after: object = self
        self._watch()

    def _watch(self) -> None:
        answers = self.cycle is not None and not self.cycle.response_complete
        if not answers and self._waited_after is self.cycle:
            self.transport.close()
            return
        self._waited_after = self if answers else self.cycle
        self._timer = self.loop.call_later(HEAD_SECONDS, self._watch)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)


class Service(uvicorn.Server):
    """A server for `served`, which `run_on` runs. `stop` may be called from any thread."""

    def __init__(self, served: Served, engine: Engine, api_key: str):
        self._served, self._engine, self._api_key = served, engine, api_key
        self._loop: asyncio.AbstractEventLoop | None = None
        self._desk: Desk | None = None
        self._ready: Callable[[], None] = lambda: None

    def run_on(self, listening: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Answers requests until the server is told to stop, by SIGTERM, Ctrl-C or `stop`.

        ready  is called when requests are answered

        Raises what has ended the thread that computes, if something did.
        """
        self._ready = ready
        with listening:
            asyncio.run(self._run(listening))

    def stop(self) -> None:
        """Asks to stop: texts may end within serve.shutdown_seconds. Asked again, they end at once."""
        # A server that has stopped already has closed its loop.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._stop)

    async def _run(self, listening: socket.socket) -> None:
        # A client that leaves while it is answered is no warning; the server counts it.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        self._loop = asyncio.get_running_loop()
        worker = Worker(self._engine, self._served.tokenizer, self._loop)
        desk = self._desk = Desk(self._served, self._engine, worker, self._api_key)
        worker.on_failure = self._fail
        app = make_app(desk, self._engine)
        super().__init__(
            uvicorn.Config(
                app, http=Protocol, ws="none", lifespan="off", log_config=None, log_level="error", access_log=False,
                server_header=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=30,
                # By then every text has ended, and what is left reads too slowly.
                timeout_graceful_shutdown=2,
            )
        )  # fmt: skip
        worker.start()
        try:
            await self.serve(sockets=[listening])
        finally:
            worker.stop()
            await asyncio.to_thread(worker.join)
        if worker.failure is not None:
            raise worker.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def _stop(self) -> None:
        assert self._desk is not None
        if self._desk.stopping:
            self._desk.end_all()
            self.should_exit = True
            return
        self._desk.stopping = True
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """Waits for the texts that are open, as long as they may go on."""
        assert self._desk is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._served.config.shutdown_seconds):
                while self._desk.num_open:
                    await asyncio.sleep(GLANCE)
        self._desk.end_all()
        self.should_exit = True

    def _fail(self) -> None:
        assert self._desk is not None
        self._desk.failed = self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Within it, signals ask to stop. The server ends well then, so that they are not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
