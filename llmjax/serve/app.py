"""The paths of the server: OpenAI's API, health, metrics, and the page to chat with."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import pathlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmjax.errors import UserError, reason_of
from llmjax.escapes import complain
from llmjax.generate.engine import Engine
from llmjax.serve.answers import Choice, Form
from llmjax.serve.asked import Asked, Served, read_chat, read_completion, read_embeddings, vector_as
from llmjax.serve.desk import Desk, Gone, until_gone
from llmjax.serve.errors import ApiError
from llmjax.serve.fields import Fields

PAGE = pathlib.Path(__file__).with_name("page.html")
# The texts whose vectors are computed between two tokens of the others. A choice.
TEXTS_AT_ONCE = 8
# The status by which nginx calls a request whose client has left. It is counted and never sent.
LEFT = 499


def make_app(desk: Desk, engine: Engine) -> Starlette:
    """The application that answers requests for a desk."""

    async def completions(request: Request) -> Response:
        return await _texts(desk, request, read_completion, chat=False)

    async def chat(request: Request) -> Response:
        return await _texts(desk, request, read_chat, chat=True)

    async def embeddings(request: Request) -> Response:
        return await _embeddings(desk, request)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(desk.served)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != desk.served.name:
            raise ApiError(404, f"that model is not here; use {desk.served.name!r}", code="model_not_found")
        return JSONResponse(_model(desk.served))

    async def health(request: Request) -> Response:
        status = "failed" if desk.failed else "stopping" if desk.stopping else "ok"
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        told = desk.counts.describe(_gauges(desk, engine))
        return PlainTextResponse(told, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def no_such_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        sentences = {
            404: "there is nothing at this path; see /v1/models",
            405: "this path wants another method",
        }
        status = error.status_code if error.status_code in sentences else 400
        # Paths that a stranger makes up are counted as one.
        desk.counts.requests["other", status] += 1
        return _refusal(ApiError(status, sentences.get(status, str(error.detail))))

    html = PAGE.read_text(encoding="utf-8")
    policy = content_policy(html)

    async def page(request: Request) -> Response:
        return HTMLResponse(
            html, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"}
        )

    paths: dict[str, tuple[str, Callable[[Request], Awaitable[Response]], bool]] = {
        "/v1/completions": ("POST", completions, True),
        "/v1/chat/completions": ("POST", chat, True),
        "/v1/embeddings": ("POST", embeddings, True),
        "/v1/models": ("GET", models, True),
        "/v1/models/{name:path}": ("GET", model, True),
        "/metrics": ("GET", metrics, True),
        "/health": ("GET", health, False),
        "/": ("GET", page, False),
    }
    return Starlette(
        routes=[
            Route(path, _guarded(desk, path, handler, keyed), methods=[method])
            for path, (method, handler, keyed) in paths.items()
        ],
        exception_handlers={HTTPException: no_such_path},
    )


def _gauges(desk: Desk, engine: Engine) -> dict[str, tuple[str, int]]:
    """What goes up and down, by name: what it is, and its value."""
    return {
        "slots": ("Texts that can be written at the same time.", desk.served.config.slots),
        "slots_used": ("Texts that are written now.", engine.num_used),
        "queue_length": ("Texts that wait for a slot.", engine.num_waiting),
        "texts_open": ("Texts that a client waits for.", desk.num_open),
    }


def content_policy(html: str) -> str:
    """The Content-Security-Policy of a page that runs its own script and style and loads nothing from elsewhere."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _guarded(
    desk: Desk, path: str, handler: Callable[[Request], Awaitable[Response]], keyed: bool
) -> Callable[[Request], Awaitable[Response]]:
    """`handler` behind the checks of who asks; every error becomes an answer, and every request is counted."""

    async def answer(request: Request) -> Response:
        try:
            desk.check_host(request)
            if keyed:
                desk.check_key(request)
            response = await handler(request)
        except Gone:
            desk.counts.left += 1
            response = Response(status_code=LEFT)
        except ApiError as error:
            response = _refusal(error)
        except UserError as error:
            response = _refusal(ApiError(400, str(error)))
        except Exception as error:
            complain(f"a request of {path} failed: {type(error).__name__}: {reason_of(error)}")
            response = _refusal(ApiError(500, "the server could not answer, and its log says why"))
        response.headers["x-content-type-options"] = "nosniff"
        if not isinstance(response, _Stream):
            desk.counts.requests[path, response.status_code] += 1
        return response

    return answer


def _refusal(error: ApiError) -> Response:
    headers = {429: {"retry-after": "1"}, 413: {"connection": "close"}, 401: {"www-authenticate": "Bearer"}}
    return JSONResponse(error.body(), status_code=error.status, headers=headers.get(error.status))


def _model(served: Served) -> dict[str, Any]:
    chats = served.format is not None
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "llmjax",
        "chats": chats,
    }


async def _texts(
    desk: Desk, request: Request, read: Callable[[Fields, Served, Callable[[], int]], Asked], chat: bool
) -> Response:
    """The answer to a request for texts, whole or as a stream."""
    started = time.monotonic()
    desk.check_open()
    fields = await desk.read_body(request)
    # Tokenizing a large prompt takes a while.
    asked = await desk.aside(read, fields, desk.served, desk.new_seed)
    form = Form(asked, desk.served.tokenizer, desk.served.name, chat)
    if asked.stream:
        stream = _Stream(desk, asked, form, started, request.url.path)
        # Too many texts are refused before the stream begins.
        stream.enter()
        return stream

    async def collect() -> list[Choice]:
        choices = [Choice(index) for index in range(len(asked.orders))]
        with desk.texts(asked) as queue:
            async for index, piece in desk.pieces(asked, queue, started):
                choices[index].add(piece)
        return choices

    choices = await _in_time(desk, until_gone(request.receive, collect()))
    desk.counts.request_seconds.add(time.monotonic() - started)
    return JSONResponse(form.whole(choices))


async def _in_time(desk: Desk, work: Awaitable[Any]) -> Any:
    """The result of `work`, which may take serve.max_seconds."""
    seconds = desk.served.config.max_seconds
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise ApiError(
            504, f"the request took longer than serve.max_seconds={seconds:g}; ask for fewer tokens"
        ) from None


class _Stream(Response):
    """An answer in server-sent events: an object for each piece of a text, then [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, desk: Desk, asked: Asked, form: Form, started: float, path: str):
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._desk, self._asked, self._form, self._started, self._path = desk, asked, form, started, path
        self._context = desk.texts(asked)

    def enter(self) -> None:
        """Asks for the texts. From here on, the response must be sent."""
        self._queue = self._context.__enter__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk, status = self._desk, 200
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _in_time(desk, until_gone(receive, self._send_parts(send)))
        except Gone:
            desk.counts.left += 1
            status = LEFT
        except ApiError as error:
            # The status is sent already, so that the error is an event.
            status = error.status
            await self._end(receive, send, _event(error.body()))
        finally:
            self._context.__exit__(None, None, None)
            desk.counts.requests[self._path, status] += 1
            desk.counts.request_seconds.add(time.monotonic() - self._started)

    async def _send_parts(self, send: Send) -> None:
        form, asked = self._form, self._asked
        waiting: dict[int, Choice] = {}
        new_tokens = 0

        async def tell(values: dict[str, Any] | None) -> None:
            if values is not None:
                await send({"type": "http.response.body", "body": _event(values), "more_body": True})

        begun = set()
        async for index, piece in self._desk.pieces(asked, self._queue, self._started):
            choice = waiting.setdefault(index, Choice(index))
            choice.add(piece)
            new_tokens += len(piece.tokens)
            if index not in begun:
                begun.add(index)
                await tell(form.begin(Choice(index, prompt=choice.prompt)))
            # Tokens whose characters are held back come with the next ones.
            if choice.text or choice.end:
                await tell(form.part(waiting.pop(index)))
        if asked.stream_usage:
            await tell(form.usage_part(new_tokens))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _end(self, receive: Receive, send: Send, last: bytes) -> None:
        """Ends the stream with a last event, unless the client reads too slowly for it."""
        work = send({"type": "http.response.body", "body": last, "more_body": False})
        try:
            async with asyncio.timeout(1):
                await until_gone(receive, work)
        except (Gone, TimeoutError):
            pass


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, allow_nan=False).encode() + b"\n\n"


async def _embeddings(desk: Desk, request: Request) -> Response:
    """The vectors of texts, computed a few at a time between the tokens of others."""
    started, served = time.monotonic(), desk.served
    desk.check_open()
    fields = await desk.read_body(request)
    texts, in_base64 = await desk.aside(read_embeddings, fields, served)
    sizes = await desk.aside(lambda: [served.embed_size(text) for text in texts])
    for size, most in sizes:
        if size > most:
            raise ApiError(
                400, f"a text has {size:,} tokens, and the model reads {most:,}; shorten it", param="input"
            )

    async def collect() -> list[Any]:
        vectors: list[Any] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            group = texts[start : start + TEXTS_AT_ONCE]
            vectors += list(await desk.worker.call(functools.partial(served.embed, group)))
        return vectors

    vectors = await _in_time(desk, until_gone(request.receive, collect()))
    read = sum(size for size, _ in sizes)
    desk.counts.prompt_tokens += read
    desk.counts.request_seconds.add(time.monotonic() - started)
    data = [
        {"object": "embedding", "index": index, "embedding": vector_as(vector_D, in_base64)}
        for index, vector_D in enumerate(vectors)
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})
