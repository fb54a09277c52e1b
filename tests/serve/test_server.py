"""The server from outside: what it answers is what the model writes, and every way out frees the slots."""

import base64
import contextlib
import functools
import http.client
import json
import re
import socket
import threading
import time

import jax
import numpy as np
import pytest
from sections import section

from llmjax.errors import UserError
from llmjax.generate.generate import make_generator
from llmjax.ops.logits import head_logits
from llmjax.serve.server import listen
from llmjax.types import Batch
from tests.serve.running import (
    BANNED,
    CONTEXT,
    TOKENIZER,
    ask,
    complete,
    engine,
    events,
    model,
    params,
    running,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "春江"}]


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@functools.cache
def generator(config):
    return make_generator(model(), config, eos_id=TOKENIZER.eos_id, banned_ids=BANNED)


def written(prompt, **settings):
    """The text that `make_generator` writes after the ids of a prompt: the last of `num_samples`."""
    config = section("generate", **{"max_tokens": 12, "temperature": 0.0, "top_p": 1.0} | settings)
    ids = [new[-1] for new in generator(config)(params(), [prompt]) if new[-1] is not None]
    return TOKENIZER.decode(ids)


def ids_of(text):
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text)]


def test_a_completion_is_what_the_generator_writes(server):
    answer = complete(server, prompt="a river", max_tokens=9)
    (choice,) = answer["choices"]
    assert choice["text"] == written(ids_of("a river"), max_tokens=9) and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 9, "total_tokens": 17}
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    echo = complete(server, prompt="a river", max_tokens=9, echo=True)["choices"][0]
    assert echo["text"] == "a river" + choice["text"] and echo["logprobs"] is None


def test_seeds_samples_lists_and_ids_are_those_of_the_generator(server):
    prompts = ["a", "春江"]
    settings = {"temperature": 0.9, "top_p": 0.8, "seed": 5}
    answer = complete(server, prompt=prompts, n=2, **settings)
    texts = [choice["text"] for choice in answer["choices"]]
    expected = [written(ids_of(p), num_samples=n, **settings) for p in prompts for n in (1, 2)]
    assert texts == expected and [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2 + 7
    as_ids = complete(server, prompt=[ids_of(p) for p in prompts], n=2, **settings)
    assert [choice["text"] for choice in as_ids["choices"]] == texts
    one = complete(server, prompt=ids_of("春江"), n=2, **settings)
    assert [choice["text"] for choice in one["choices"]] == texts[2:]


def test_requests_without_a_seed_differ_and_the_first_has_that_of_the_config():
    with running() as server:
        complete(server, seed=9)
        texts = [complete(server, temperature=1.5)["choices"][0]["text"] for _ in range(3)]
    config = {"temperature": 1.5, "top_p": server.served.defaults.top_p}
    assert len(set(texts)) == 3 and texts[0] == written(ids_of("a river"), **config)


@functools.cache
def full_pass(ids):
    index = np.arange(CONTEXT, dtype=np.int32)[None]
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(ids)] = ids
    segments = (index < len(ids)).astype(np.int32)
    batch = Batch(tokens, tokens, segments.astype(np.float32), segments, index, np.zeros(1, np.int32))
    hidden = jax.jit(model().apply)(params(), batch).hidden_BTD
    return np.asarray(jax.nn.log_softmax(head_logits(hidden, model().head(params())), axis=-1))[0, : len(ids)]


def test_log_probabilities_of_a_prompt_are_those_of_the_full_pass_as_a_harness_asks_for_them(server):
    """The request of lm-evaluation-harness, whose token of the answer is dropped again."""
    prompt = TOKENIZER.encode("a river, 春")
    answer = complete(server, prompt=[prompt], echo=True, logprobs=3, max_tokens=1, temperature=0, seed=1234)
    (choice,) = answer["choices"]
    told, expected = choice["logprobs"], full_pass(tuple(prompt))
    assert [len(told[name]) for name in told] == [len(prompt) + 1] * 4
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    np.testing.assert_allclose(
        told["token_logprobs"][1:-1], [expected[i, token] for i, token in enumerate(prompt[1:])], atol=1e-4
    )
    assert told["tokens"][:3] == ["a", " ", "r"] and told["tokens"][9] == "bytes:\\xe6"
    assert told["text_offset"][:13] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 10]
    for i, top in enumerate(told["top_logprobs"][1:-1]):
        assert max(top.values()) == pytest.approx(expected[i].max(), abs=1e-4) and 3 <= len(top) <= 4
    only_read = complete(server, prompt=[prompt], echo=True, logprobs=3, max_tokens=0)["choices"][0]
    assert only_read["text"] == "a river, 春" and only_read["finish_reason"] == "length"
    assert only_read["logprobs"]["token_logprobs"] == told["token_logprobs"][:-1]


@pytest.mark.parametrize("body", [
    {"prompt": "a river", "max_tokens": 20},
    {"prompt": ["a", "b"], "n": 2, "temperature": 1.0, "seed": 2, "logprobs": 2},
    {"prompt": "a river", "echo": True, "logprobs": 1, "max_tokens": 5},
    {"prompt": "a river", "echo": True, "max_tokens": 5},
])  # fmt: skip
def test_a_stream_brings_the_same_in_parts(body, server):
    whole = complete(server, **body)
    *parts, last = events(server, COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if choice["logprobs"] is not None:
            for name, values in choice["logprobs"].items():
                joined = [value for part in own if part["logprobs"] for value in part["logprobs"][name]]
                assert joined == values, name
    assert all(part["usage"] is None for part in parts) and {part["id"] for part in parts} == {last["id"]}


def test_a_stop_string_ends_a_text_and_nothing_of_it_is_sent(server):
    text = complete(server, max_tokens=40, temperature=1.3, seed=3)["choices"][0]["text"]
    stop = text[10:13]
    body = {"prompt": "a river", "max_tokens": 40, "temperature": 1.3, "seed": 3, "stop": ["never!", stop]}
    answer = complete(server, **body)
    assert answer["choices"][0]["text"] == text[: text.find(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] < 40
    parts = [part["choices"][0]["text"] for part in events(server, COMPLETIONS, body)]
    assert "".join(parts) == text[: text.find(stop)]


def test_a_chat_answers_in_the_format_of_the_model(server):
    form = server.served.format
    prompt = [TOKENIZER.bos_id, *form.opening["system"], *TOKENIZER.encode("be kind"), *form.opening["user"],
              *TOKENIZER.encode("春江"), *form.opening["assistant"]]  # fmt: skip
    status, answer = ask(server, "POST", CHAT, {"messages": TALK, "logprobs": True, "top_logprobs": 2})
    (choice,) = answer["choices"]
    assert status == 200 and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == written(prompt) and answer["usage"]["prompt_tokens"] == len(prompt)
    assert len(choice["logprobs"]["content"]) == 12
    assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
    parts = [
        {"type": "text", "text": "be "}, {"type": "text", "text": "kind"},
    ]  # fmt: skip
    first, *rest = events(server, CHAT, {"messages": [{"role": "developer", "content": parts}, TALK[1]]})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [part["choices"][0]["delta"] for part in rest]
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]


def test_vectors_are_numbers_or_base64(server):
    texts = ["a", "春江", *(f"text {i}" for i in range(20))]
    status, answer = ask(server, "POST", "/v1/embeddings", {"input": texts})
    assert status == 200 and [entry["index"] for entry in answer["data"]] == list(range(22))
    assert answer["data"][1]["embedding"] == [2.0, float(sum("春江".encode())), 0.25]
    _, packed = ask(server, "POST", "/v1/embeddings", {"input": "春江", "encoding_format": "base64"})
    data = base64.b64decode(packed["data"][0]["embedding"])
    assert np.frombuffer(data, "<f4").tolist() == answer["data"][1]["embedding"]
    assert packed["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
MISTAKES = {
    "no JSON": (COMPLETIONS, b"{", 400, "the body is no JSON"),
    "no UTF-8": (COMPLETIONS, b'{"prompt": "\xff"}', 400, "the body is no JSON"),
    "no object": (COMPLETIONS, [1], 400, "the body is a list of 1"),
    "NaN": (COMPLETIONS, b'{"temperature": NaN}', 400, "NaN is no number of JSON"),
    "deep": (COMPLETIONS, DEEP, 400, "nested too deeply"),
    "long number": (COMPLETIONS, b'{"n": 1' + b"0" * 5000 + b"}", 400, "the body is no JSON"),
    "large number": (COMPLETIONS, b'{"n": 1' + b"0" * 4000 + b"}", 400, "n=a huge number must be a whole number"),
    "surrogate": (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
    "unknown": (COMPLETIONS, {"prompt": "a", "tempurature": 1}, 400, "the field 'tempurature' is not known"),
    "unsupported": (COMPLETIONS, {"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty=1 is not supported"),
    "two limits": (
        CHAT,
        {"messages": TALK, "max_tokens": 9, "max_completion_tokens": 1},
        400,
        "max_tokens and max_completion_tokens say the same; send one",
    ),
    "tools": (CHAT, {"messages": TALK, "tools": [{}]}, 400, "tools=a list of 1 is not supported"),
    "model": (COMPLETIONS, {"prompt": "a", "model": "gpt-9"}, 404, "the model 'gpt-9' is not here; use 'tiny'"),
    "type": (COMPLETIONS, {"prompt": "a", "max_tokens": "9"}, 400, "max_tokens='9' must be a whole number from 1"),
    "bool": (COMPLETIONS, {"prompt": "a", "max_tokens": True}, 400, "max_tokens=True must be"),
    "negative": (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature=-1 must be a number from 0"),
    "no tokens": (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0 must be"),
    "many tokens": (COMPLETIONS, {"prompt": "a", "max_tokens": 10**6}, 400, "from 1 to 4096"),
    "many texts": (COMPLETIONS, {"prompt": "a", "n": 1000}, 400, "asks for 1000 texts; ask for at most 68"),
    "prompts": (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt=an object of 1 must be a text"),
    "no prompt": (COMPLETIONS, {"prompt": []}, 400, "prompt=a list of 0 must be a text"),
    "mixed ids": (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt=a list of 2 must be a text or a list of ids"),
    "wrong ids": (COMPLETIONS, {"prompt": [1, 277]}, 400, "an id outside of 0 to 276"),
    "huge ids": (COMPLETIONS, {"prompt": [-(10**30)]}, 400, "an id outside of 0 to 276"),
    "long prompt": (COMPLETIONS, {"prompt": "a" * 200}, 400, "the prompt has 201 tokens, and the model holds 96"),
    "stops": (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, 400, "at most 16 texts"),
    "stop": (COMPLETIONS, {"prompt": "a", "stop": 3}, 400, "stop=3 must be a text or a list"),
    "logprobs": (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs=21 must be"),
    "options": (COMPLETIONS, {"prompt": "a", "stream_options": {"x": 1}}, 400, "the field 'x' is not known"),
    "messages": (CHAT, {"messages": []}, 400, "messages=a list of 0 must be a list of objects"),
    "message": (CHAT, {"messages": ["a"]}, 400, "messages='a' must be a list of objects"),
    "role": (CHAT, {"messages": [{"role": "tool", "content": ""}]}, 400, "role='tool' is not known"),
    "role, list": (CHAT, {"messages": [{"role": [], "content": ""}]}, 400, "role=a list of 0 is not known"),
    "content": (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "content=None must be a text"),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "no text"),
    "last": (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, 400, "the last message is not of the user"),
    "long talk": (CHAT, {"messages": [{"role": "user", "content": "a" * 99}]}, 400, "the prompt has 102 tokens"),
    "top": (CHAT, {"messages": TALK, "top_logprobs": 2}, 400, "top_logprobs=2 needs logprobs=true"),
    "input": ("/v1/embeddings", {"input": [1, 2]}, 400, "input=a list of 2 must be a text or a list of texts"),
    "long input": ("/v1/embeddings", {"input": "a" * 97}, 400, "a text has 97 tokens, and the model reads 96"),
    "inputs": ("/v1/embeddings", {"input": ["a"] * 69}, 400, "input has 69 texts; send at most 68"),
    "format": ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, 400, "encoding_format='int8' must be"),
    "dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 2}, 400, "dimensions=2 is not supported"),
    "path": ("/v1/nothing", {}, 404, "there is nothing at this path"),
    "method": ("/v1/models", {}, 405, "this path wants another method"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_with_its_status(case, server):
    path, body, status, sentence = MISTAKES[case]
    found, answer = ask(server, "POST", path, body)
    assert found == status and sentence in answer["error"]["message"], answer
    assert (
        answer["error"].keys() == {"message", "type", "param", "code"}
        and "\n" not in answer["error"]["message"]
    )
    assert (answer["error"]["code"] == "context_length_exceeded") == ("the prompt has" in sentence)


def test_a_request_that_is_too_large_is_refused_whether_or_not_it_says_so():
    with running(max_body_bytes=1000) as server:
        assert ask(server, "POST", COMPLETIONS, {"prompt": "a" * 2000})[0] == 413
        connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
        chunks = (b"[" * 100 for _ in range(50))
        with contextlib.suppress(ConnectionError):
            connection.request(
                "POST", COMPLETIONS, chunks, {"content-type": "application/json"}, encode_chunked=True
            )
        assert connection.getresponse().status == 413
        connection.close()


def test_a_client_that_never_ends_a_request_loses_its_connection(monkeypatch):
    monkeypatch.setattr("llmjax.serve.server.HEAD_SECONDS", 0.3)
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    with slow_steps(monkeypatch, 0.1), running() as server:
        for sent in (b"", head, head + b"\r\n" + head):
            with socket.create_connection((server.host, server.port)) as connection:
                connection.settimeout(10)
                connection.sendall(sent)
                started, said = time.monotonic(), b""
                while data := connection.recv(9999):
                    said += data
                assert time.monotonic() - started > 0.25 and said.count(b"200 OK") == sent.count(b"\r\n\r\n")
        # An answer that takes longer is none of these.
        assert len(complete(server, max_tokens=12)["choices"][0]["text"]) > 0


def test_forms_of_strange_pages_and_strange_hosts_are_refused(server):
    assert ask(server, "POST", COMPLETIONS, {"prompt": "a"}, headers={"content-type": "text/plain"})[0] == 415
    status, answer = ask(server, "GET", "/v1/models", headers={"host": "evil.example:80"})
    assert status == 403 and "the Host 'evil.example' is not this machine" in answer["error"]["message"]
    for host in ("localhost", f"LOCALHOST:{server.port}", "[::1]:80", "127.0.0.1"):
        assert ask(server, "GET", "/health", headers={"host": host})[0] == 200


def test_with_a_key_only_those_who_have_it_are_answered():
    with running(key="sécret") as server:
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic sécret".encode("latin-1")},
        ):
            status, answer = ask(server, "GET", "/v1/models", headers=header)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert ask(server, "POST", COMPLETIONS, {"prompt": "a"}, headers=header)[0] == 401
            assert ask(server, "GET", "/metrics", headers=header)[0] == 401
        assert ask(server, "GET", "/health")[0] == ask(server, "GET", "/")[0] == 200
        key = {"authorization": "Bearer sécret".encode()}
        assert ask(server, "GET", "/v1/models", headers=key)[0] == 200


def test_models_and_health(server):
    assert ask(server, "GET", "/health") == (200, {"status": "ok"})
    (entry,) = ask(server, "GET", "/v1/models")[1]["data"]
    assert ask(server, "GET", "/v1/models/tiny") == (200, entry) and entry["id"] == "tiny"
    assert ask(server, "GET", "/v1/models/other")[0] == 404


def test_metrics_are_lines_that_prometheus_reads_and_count_what_happened():
    with running() as server:
        complete(server, max_tokens=7)
        ask(server, "POST", COMPLETIONS, b"{")
        ask(server, "GET", "/made/up")
        status, page = ask(server, "GET", "/metrics")
    line = re.compile(r'llmjax_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? -?[\d.e+]+')
    values = {}
    for text in page.splitlines():
        if not text.startswith("# "):
            assert line.fullmatch(text), text
            name, value = text.rsplit(" ", 1)
            values[name] = float(value)
    assert status == 200
    assert values['llmjax_requests_total{path="/v1/completions",status="200"}'] == 1
    assert values['llmjax_requests_total{path="/v1/completions",status="400"}'] == 1
    assert values['llmjax_requests_total{path="other",status="404"}'] == 1
    assert values["llmjax_new_tokens_total"] == 7 and values["llmjax_prompt_tokens_total"] == 8
    assert values["llmjax_slots"] == 4 and values["llmjax_slots_used"] == values["llmjax_queue_length"] == 0
    assert values["llmjax_request_seconds_count"] == values['llmjax_request_seconds_bucket{le="+Inf"}'] == 1


@contextlib.contextmanager
def slow_steps(monkeypatch, seconds):
    """Makes every step of the engine take a while; gives the list of the slots in use before each step."""
    used, step = [], engine().step

    def slow():
        used.append(engine().num_used)
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(engine(), "step", slow)
    yield used


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_within_a_token(stream, monkeypatch):
    with slow_steps(monkeypatch, 0.1) as used, running() as server:
        body = {"prompt": ["a", "b"], "max_tokens": 80, "stream": stream}
        connection = http.client.HTTPConnection(server.host, server.port)
        connection.request("POST", COMPLETIONS, json.dumps(body), {"content-type": "application/json"})
        wait_until(lambda: len(used) >= 4)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        before = len(used)
        wait_until(lambda: server.engine.is_idle)
        # The step under way, and one more if the server heard of it late.
        assert len(used) <= before + 2 and max(used) == 2
        wait_until(lambda: 'status="499"} 1' in ask(server, "GET", "/metrics")[1])


def test_a_full_queue_is_refused_and_comes_free_again(monkeypatch):
    with slow_steps(monkeypatch, 0.05), running(max_queue=1) as server:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(complete(server, max_tokens=15))) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: (server.engine.num_used, server.engine.num_waiting) == (4, 1))
        status, answer = ask(server, "POST", COMPLETIONS, {"prompt": "a"})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert "5 texts are written or wait, of at most 5" in answer["error"]["message"]
        for thread in threads:
            thread.join()
        assert len(answers) == 5 and len({answer["choices"][0]["text"] for answer in answers}) == 1
        complete(server, max_tokens=2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_is_ended(stream, monkeypatch):
    with slow_steps(monkeypatch, 0.05), running(max_seconds=0.3) as server:
        if stream:
            *parts, last = events_to_the_end(server, {"prompt": "a", "max_tokens": 80})
            assert parts and "serve.max_seconds=0.3" in last["error"]["message"]
        else:
            status, answer = ask(server, "POST", COMPLETIONS, {"prompt": "a", "max_tokens": 80})
            assert (
                status == 504 and "serve.max_seconds=0.3; ask for fewer tokens" in answer["error"]["message"]
            )
        wait_until(lambda: server.engine.is_idle)


def events_to_the_end(server, body):
    """The objects of a stream that an error ends, so that no [DONE] comes."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request("POST", COMPLETIONS, json.dumps({**body, "stream": True}),
                       {"content-type": "application/json"})  # fmt: skip
    lines = connection.getresponse().read().split(b"\n\n")
    connection.close()
    return [json.loads(line.removeprefix(b"data: ")) for line in lines if line]


def test_a_server_that_stops_finishes_its_texts_and_begins_no_others(monkeypatch):
    with slow_steps(monkeypatch, 0.05), running() as server:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(complete(server, max_tokens=15)))
        thread.start()
        wait_until(lambda: server.engine.num_used == 1)
        server.service.stop()
        wait_until(lambda: ask(server, "GET", "/health") == (503, {"status": "stopping"}))
        status, answer = ask(server, "POST", COMPLETIONS, {"prompt": "a"})
        assert status == 503 and "the server is stopping" in answer["error"]["message"]
        thread.join()
        assert answers[0]["choices"][0]["text"] == written(ids_of("a river"), max_tokens=15)
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_texts_that_take_longer_than_the_shutdown_may_are_ended_and_told(monkeypatch):
    with slow_steps(monkeypatch, 0.05), running(shutdown_seconds=0.2) as server:
        found = []
        body = {"prompt": "a", "max_tokens": 80}
        threads = [
            threading.Thread(target=lambda: found.append(events_to_the_end(server, body)[-1])),
            threading.Thread(target=lambda: found.append(ask(server, "POST", COMPLETIONS, body)[1])),
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.engine.num_used == 2)
        server.service.stop()
        for thread in threads:
            thread.join()
        assert ["the server is stopping" in answer["error"]["message"] for answer in found] == [True, True]
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert engine().is_idle


def test_a_thread_that_fails_ends_the_server_and_nobody_waits(monkeypatch):
    """As when the device has no memory left: what is open gets an answer, and the error is that of the server."""
    raised = []
    with running() as server:
        monkeypatch.setattr(threading, "excepthook", lambda hook: raised.append(hook.exc_value))

        def fail():
            raise MemoryError("no memory for the step")

        with monkeypatch.context() as patch:
            patch.setattr(engine(), "step", fail)
            status, answer = ask(server, "POST", COMPLETIONS, {"prompt": "a"})
            assert status == 500 and "the server has failed" in answer["error"]["message"]
            server.thread.join(10)
        assert not server.thread.is_alive() and str(raised[0]) == "no memory for the step"
        # The engine is shared with other tests, and goes on without the order.
        while not engine().is_idle:
            engine().step()


def test_an_unforeseen_error_is_an_answer_and_a_line_of_the_log(server, monkeypatch, capsys):
    def fail(text):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(TOKENIZER, "encode", fail)
    status, answer = ask(server, "POST", COMPLETIONS, {"prompt": "a"})
    assert status == 500 and answer["error"]["message"] == "the server could not answer, and its log says why"
    assert "a request of /v1/completions failed: ZeroDivisionError: by zero" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_sentence(server):
    with pytest.raises(UserError, match=f"serve.port={server.port} cannot be listened at"):
        listen(section("serve", port=server.port))
    with pytest.raises(UserError, match="serve.host='no.such.host.invalid'"):
        listen(section("serve", host="no.such.host.invalid"))


@pytest.mark.parametrize("key, value", [("slots", 0), ("port", 65536), ("max_seconds", 0), ("host", "")])
def test_settings_of_the_server_have_ranges(key, value):
    with pytest.raises(UserError, match=f"serve.{key}="):
        section("serve", **{key: value})
