"""A server for tests, in a thread of the process: a tiny model of bytes, and clients without further packages."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import threading
import types

import jax
import numpy as np
from sections import block_section, section

from llmjax.data.chat.formats import make_format
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.generate.engine import Engine
from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.serve.asked import Served
from llmjax.serve.server import Service, listen

TOKENIZER = ByteTokenizer()
CONTEXT = 96
# A text of this model is printable more often than not, so that stop strings and characters have something to find.
BANNED = tuple(i for i in range(TOKENIZER.vocab_size) if i < 21 and i != TOKENIZER.eos_id)


@functools.cache
def model():
    return GPT(
        resolve(block_section(num_layers=2, model_dim=16, num_heads=2, init_std=0.5)),
        TOKENIZER.vocab_size,
        CONTEXT,
    )


@functools.cache
def params():
    return jax.jit(model().init)(jax.random.key(1))


@functools.cache
def engine(slots=4):
    """Engines are shared by servers that run one after the other, because compiling takes long."""
    return Engine(model(), params(), slots, CONTEXT, banned_ids=BANNED)


def embed(texts):
    """Vectors that say what text they are of."""
    return np.array([[len(text), sum(text.encode()), 0.25] for text in texts], np.float32)


def served(**changes):
    """What the server serves; `changes` are keys of the section `serve`."""
    generate = section("generate", max_tokens=12, temperature=0.0)
    return Served(
        "tiny", 1, TOKENIZER, generate, section("serve", port=0, slots=4, **changes), CONTEXT,
        embed, lambda text: (len(text.encode()), CONTEXT), make_format("plain", TOKENIZER),
    )  # fmt: skip


@contextlib.contextmanager
def running(key="", **changes):
    """A server that runs within the `with` block: its `host`, `port`, `service`, `engine` and `thread`."""
    what = served(**changes)
    listening = listen(what.config)
    port = listening.getsockname()[1]
    service, ready = Service(what, engine(), key), threading.Event()
    thread = threading.Thread(target=service.run_on, args=(listening, ready.set))
    thread.start()
    assert ready.wait(60)
    server = types.SimpleNamespace(
        host=what.config.host, port=port, service=service, engine=engine(), thread=thread, served=what
    )
    try:
        yield server
    finally:
        service.stop()
        thread.join(60)
        assert not thread.is_alive() and engine().is_idle


def ask(server, method, path, body=None, *, headers=None, timeout=60):
    """The status and the answer, as JSON where it is."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"content-type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status, json.loads(text) if is_json else text.decode()


def complete(server, **body):
    """The answer to a request for completions, which must be one."""
    status, answer = ask(server, "POST", "/v1/completions", {"prompt": "a river", **body})
    assert status == 200, answer
    return answer


def events(server, path, body, leave_after=10**9):
    """The objects of a stream, whose client leaves after some of them; without the closing [DONE], which must come."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request(
        "POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"}
    )
    response, found = connection.getresponse(), []
    assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
    try:
        while len(found) < leave_after:
            line = response.readline()
            if line == b"\n":
                continue
            assert line.startswith(b"data: "), line
            if line == b"data: [DONE]\n":
                return found
            found.append(json.loads(line.removeprefix(b"data: ")))
    finally:
        connection.close()
    return found
