"""The server under load: 64 clients at once, of which some leave, send too much or send nonsense.

Every token that the server sent must be that of an independent dense replay: full passes without a cache. By default
this takes 20 seconds; LLMJAX_LOAD_SECONDS=120 makes them two minutes.
"""

import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import signal
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import llmjax
from llmjax import main
from llmjax.generate.generate import sample_key
from llmjax.modes.generate import no_text
from llmjax.ops.logits import head_logits, sample
from llmjax.types import Batch
from tests.modes.test_serve import SETTINGS, serving
from tests.serve.running import ask

SECONDS, CLIENTS, SLOTS, CONTEXT, LARGEST = (
    float(os.environ.get("LLMJAX_LOAD_SECONDS", 20)),
    64,
    6,
    96,
    20_000,
)
# What is asked for, over and over: prompts of many lengths, greedy and sampled.
GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 1.5, "top_k": 40, "top_p": 0.9}
REQUESTS = [
    {"prompt": ("river stone 春江 " * 9)[: 1 + 3 * i % 50], "max_tokens": 5 + 7 * i % 45, "seed": i}
    | (SAMPLED if i % 3 else GREEDY)
    for i in range(40)
]
# Bodies of requests, and the statuses that they may get: one that is too large is not read to its end, so that its
# sender may not come to read the answer.
MISTAKES = [
    (b"{", {400}), (b'{"prompt": ' + b"[" * 9000, {400}), (b"\xff\xfe", {400}), ({"prompt": "a", "n": 10**9}, {400}),
    ({"prompt": "a" * 5000}, {400}), ({"prompt": [10**30]}, {400}), ({"model": "x" * 9000}, {404}),
    (b"[" + b"1," * LARGEST + b"1]", {413, None}),
]  # fmt: skip
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
# What is sent over a connection that is closed soon, whatever comes back.
HOSTILE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, GET + b"x: y\r\n" * 20_000, b"GET /" + b"a" * 90_000,
    POST + b"content-length: 99\r\n\r\n{", POST + b"content-length: -1\r\n\r\n", (GET + b"\r\n") * 40, GET,
    POST + b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFF\r\n",
    POST + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"CONNECT a:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
]  # fmt: skip


def dense_replay(loaded):
    """The ids of the answer to each of REQUESTS: at each token, one full pass over all texts without a cache."""
    program, tokenizer = loaded.program, loaded.tokenizer
    banned = np.array(no_text(tokenizer))
    texts = [[tokenizer.bos_id, *tokenizer.encode(request["prompt"])] for request in REQUESTS]
    starts = [len(text) for text in texts]
    index = np.broadcast_to(np.arange(CONTEXT + 8, dtype=np.int32), (len(texts), CONTEXT + 8))
    keys = jnp.stack([sample_key(request["seed"], jnp.int32(0), jnp.uint32(0)) for request in REQUESTS])

    @jax.jit
    def next_ids(params, tokens, lengths, steps):
        segments = (index < lengths[:, None]).astype(jnp.int32)
        row = jnp.zeros(len(texts), jnp.int32)
        batch = Batch(tokens, tokens, segments.astype(jnp.float32), segments, index, row)
        logits = head_logits(program.model.apply(params, batch).hidden_BTD, program.model.head(params))
        last = (
            jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
            .at[:, banned]
            .set(-jnp.inf)
        )
        each = jax.vmap(jax.random.fold_in)(keys, steps)
        drawn = jax.vmap(lambda key, row: sample(key, row[None], **SAMPLED)[0])(each, last)
        return jnp.argmax(last, axis=-1), drawn

    done = [False] * len(texts)
    while not all(done):
        tokens = np.zeros(index.shape, np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
        lengths = np.array(list(map(len, texts)), np.int32)
        steps = np.array([len(text) - start for text, start in zip(texts, starts, strict=True)], np.uint32)
        likeliest, drawn = map(np.asarray, next_ids(loaded.params, tokens, lengths, steps))
        for row, request in enumerate(REQUESTS):
            if not done[row]:
                new = int(likeliest[row] if request["temperature"] == 0 else drawn[row])
                done[row] = new == tokenizer.eos_id
                texts[row] += [] if done[row] else [new]
                # The last token of a full context is written, and not read.
                most = min(request["max_tokens"], CONTEXT - starts[row] + 1)
                done[row] |= len(texts[row]) - starts[row] == most
    return [text[start:] for text, start in zip(texts, starts, strict=True)]


class Clients:
    """What all clients share: what they saw, and what went wrong."""

    def __init__(self, server, tokenizer, expected):
        self.server, self.expected = server, expected
        first = tokenizer.vocab_size - 256
        self.names = {self.name(tokenizer.id_to_bytes(first + i)): first + i for i in range(256)}
        self.end, self.lock = time.monotonic() + SECONDS, threading.Lock()
        self.seen, self.wrong, self.tokens = collections.Counter(), [], 0

    @staticmethod
    def name(data):
        try:
            return data.decode()
        except UnicodeDecodeError:
            return f"bytes:\\x{data[0]:02x}"

    def run(self, number):
        rng = random.Random(number)
        weights = {
            self.stream: 10, self.leave: 4, self.whole: 3, self.vectors: 1, self.mistake: 3, self.hostile: 3,
        }  # fmt: skip
        while time.monotonic() < self.end and not self.wrong:
            act = rng.choices([*weights], [*weights.values()])[0]
            try:
                act(rng)
            except Exception as error:
                self.wrong.append(f"{act.__name__}: {error!r}")

    def count(self, what, tokens=0):
        with self.lock:
            self.seen[what] += 1
            self.tokens += tokens

    def check(self, place, names, whole):
        ids = [self.names[name] for name in names]
        expected = self.expected[place]
        if ids != (expected if whole else expected[: len(ids)]):
            self.wrong.append(f"request {place} got {ids}, and the replay has {expected}")

    def stream(self, rng, leave_after=10**9):
        place = rng.randrange(len(REQUESTS))
        body = json.dumps({**REQUESTS[place], "stream": True, "logprobs": 0})
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=120)
        names, ended = [], False
        try:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status == 429:
                self.count("full")
                time.sleep(0.05)
                return
            assert response.status == 200, response.read()
            while len(names) < leave_after and not ended:
                line = response.readline()
                assert line.startswith((b"data: ", b"\n")), line
                ended = line == b"data: [DONE]\n"
                if line.startswith(b"data: {"):
                    names += json.loads(line[6:])["choices"][0]["logprobs"]["tokens"]
        finally:
            connection.close()
        self.check(place, names, ended)
        self.count("streams" if ended else "left", len(names))

    def leave(self, rng):
        self.stream(rng, leave_after=rng.randrange(6))

    def whole(self, rng):
        place = rng.randrange(len(REQUESTS))
        status, answer = ask(
            self.server, "POST", "/v1/completions", {**REQUESTS[place], "logprobs": 0}, timeout=120
        )
        if status == 429:
            self.count("full")
            return
        assert status == 200, answer
        names = answer["choices"][0]["logprobs"]["tokens"]
        self.check(place, names, True)
        self.count("whole", len(names))

    def vectors(self, rng):
        status, answer = ask(
            self.server, "POST", "/v1/embeddings", {"input": ["river", "stone"]}, timeout=120
        )
        assert status == 200 and len(answer["data"]) == 2, answer
        self.count("vectors")

    def mistake(self, rng):
        body, statuses = rng.choice(MISTAKES)
        try:
            status, answer = ask(self.server, "POST", "/v1/completions", body)
        except ConnectionError:
            status, answer = None, None
        assert status in statuses, (body[:99] if isinstance(body, bytes) else body, status, answer)
        self.count("mistakes")

    def hostile(self, rng):
        data = rng.choice(HOSTILE)
        with (
            contextlib.suppress(OSError),
            socket.create_connection((self.server.host, self.server.port)) as connection,
        ):
            connection.settimeout(2)
            connection.sendall(data)
            if rng.random() < 0.5:
                assert b"root:" not in connection.recv(65536)
            else:
                time.sleep(rng.random() / 5)
        self.count("hostile")


def standing(process):
    """The memory of a process in bytes, and its open files and threads."""
    folder = pathlib.Path(f"/proc/{process.pid}")
    memory = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return (
        int(memory.split()[1]) * 1000,
        len(list((folder / "fd").iterdir())),
        len(list((folder / "task").iterdir())),
    )


def gauges(server):
    """The values of the gauges on the page for Prometheus."""
    lines = [line.rsplit(" ", 1) for line in ask(server, "GET", "/metrics")[1].splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


@pytest.mark.slow
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="the system does not show memory in /proc"
)
def test_under_load_every_answer_is_right_and_nothing_leaks(tmp_path, capsys):
    tiny_run.write_corpus(tmp_path / "corpus", text=tiny_run.CHINESE)
    words = tiny_run.command(
        tmp_path, f"--workdir={tmp_path / 'run'}", **SETTINGS | {"train__num_updates": 30}
    )
    assert main.main(words) == 0
    loaded = llmjax.load(tmp_path / "run")._loaded
    settings = {
        "slots": SLOTS, "max_context": CONTEXT, "max_queue": 40, "max_body_bytes": LARGEST, "max_seconds": 100,
    }  # fmt: skip
    with serving(
        tmp_path / "run", *(f"--config.serve.{key}={value}" for key, value in settings.items())
    ) as server:
        clients = Clients(server, loaded.tokenizer, dense_replay(loaded))
        # Programs of all lengths of prompts are compiled before memory is measured.
        for request in REQUESTS:
            assert ask(server, "POST", "/v1/completions", request)[0] == 200
        threads = [threading.Thread(target=clients.run, args=(i,)) for i in range(CLIENTS)]
        clients.end = time.monotonic() + SECONDS
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 3)
        memory = standing(server.process)[0]
        health = ask(server, "GET", "/health")
        for thread in threads:
            thread.join()
        assert clients.wrong == [] and health == (200, {"status": "ok"})
        end = time.monotonic() + 40
        while gauges(server)["llmjax_texts_open"] or gauges(server)["llmjax_slots_used"]:
            assert time.monotonic() < end
        # Half bodies wait for the rest of them no longer than their connections live.
        while standing(server.process)[1] > 60 and time.monotonic() < end:
            time.sleep(0.2)
        after, files, running = standing(server.process)
        print(SECONDS, dict(clients.seen), clients.tokens, "tokens", memory, after, files, running)
        assert after < memory + 30e6 and files < 60 and running < 60
        wanted = {"streams", "left", "whole", "vectors", "mistakes", "hostile"}
        assert wanted <= clients.seen.keys() and clients.tokens > 50 * SECONDS
        counted = gauges(server)
        assert counted["llmjax_new_tokens_total"] >= clients.tokens and counted["llmjax_queue_length"] == 0
        server.process.send_signal(signal.SIGTERM)
        out, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, out, err) == (0, "the server has stopped\n", "")
