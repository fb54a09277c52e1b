"""`--mode=serve`: a run is served as the other modes use it, and every way to end it ends well."""

import contextlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import threading
import types

import numpy as np
import pytest
import tiny_run
from some_slow import often

import llmjax
from llmjax import main
from llmjax.generate.engine import Written
from llmjax.generate.text import StoppedText
from llmjax.modes import serve
from llmjax.modes.chat import Chat
from llmjax.modes.dispatch import make_request
from llmjax.modes.generate import Writer, load
from llmjax.serve.asked import read_completion
from llmjax.serve.fields import Fields
from llmjax.workdir.contents import saved_config
from tests.modes.test_modes import compile_once, refuse  # noqa: F401 - a fixture
from tests.serve.running import ask

SETTINGS = {
    "train__num_updates": 1,
    "evaluate__every": 0,
    "checkpoint__every": 0,
    "compute__accumulation_steps": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compile_once):  # noqa: F811 - the fixture
    """The workdir of a run of a GPT."""
    folder = tmp_path_factory.mktemp("serve")
    tiny_run.write_corpus(folder / "corpus", text=tiny_run.CHINESE)
    assert main.main(tiny_run.command(folder, f"--workdir={folder / 'run'}", **SETTINGS)) == 0
    return folder / "run"


@contextlib.contextmanager
def serving(workdir, *words):
    """A server in a process of its own: its `host`, `port` and `process`."""
    process = tiny_run.start(
        ["llmjax", f"--workdir={workdir}", "--mode=serve", "--config.serve.port=0", *words]
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(
            r"(\S+) is at http://127\.0\.0\.1:(\d+)/v1, and a page to chat with at http://.*/\n", line
        )
        assert found, (line, process.communicate())
        yield types.SimpleNamespace(host="127.0.0.1", port=int(found[2]), process=process, name=found[1])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "number", often([signal.SIGTERM, signal.SIGINT], lambda number: number == signal.SIGTERM)
)
def test_a_run_is_served_and_a_signal_lets_its_texts_end(trained, number):
    run = llmjax.load(trained)
    with serving(trained, "--config.generate.temperature=0", "--config.serve.max_context=4000") as server:
        assert server.name == "run"
        status, answer = ask(server, "POST", "/v1/completions", {"prompt": "river", "max_tokens": 9})
        assert status == 200
        assert answer["choices"][0]["text"] == run.generate("river", max_tokens=9, temperature=0.0)
        _, answer = ask(server, "POST", "/v1/embeddings", {"input": ["river", "春江"]})
        vectors = [entry["embedding"] for entry in answer["data"]]
        np.testing.assert_allclose(vectors, run.embed(["river", "春江"]), rtol=1e-5, atol=1e-6)
        assert answer["usage"]["prompt_tokens"] == 6 + 7
        status, answer = ask(
            server, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}
        )
        assert (
            status == 400
            and "task.name='language_model' learns no conversation" in answer["error"]["message"]
        )
        # A text that is written while the signal comes is written to its end.
        answers, body = [], {"prompt": "river", "max_tokens": 300}
        thread = threading.Thread(target=lambda: answers.append(ask(server, "POST", "/v1/completions", body)))
        thread.start()
        while "llmjax_slots_used 1" not in ask(server, "GET", "/metrics")[1]:
            pass
        server.process.send_signal(number)
        thread.join()
        status, answer = answers[0]
        assert status == 200 and answer["usage"]["completion_tokens"] > 0
        out, err = server.process.communicate(timeout=30)
        assert (server.process.returncode, out, err) == (0, "the server has stopped\n", "")


@pytest.mark.slow
def test_a_conversation_is_answered_as_in_mode_chat(tmp_path, capsys):
    tiny_run.write_pairs(tmp_path / "pairs", 100)
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "corpus").mkdir()
    talks = [json.dumps({"messages": [pair["source"], pair["text"]]}) for pair in pairs]
    (tmp_path / "corpus" / "talks.jsonl").write_text("\n".join(talks))
    settings = {
        **SETTINGS, "task__name": "conversation", "data__text_field": "messages", "data__seq_len": 64,
        "train__num_updates": 20, "conversation__system": "be kind", "generate__temperature": 0.0,
    }  # fmt: skip
    assert main.main(tiny_run.command(tmp_path, f"--workdir={tmp_path / 'run'}", **settings)) == 0
    chat = Chat(load(make_request("chat", saved_config(tmp_path / "run"), tmp_path / "run")))
    first, second = chat.answer("river"), chat.answer("stone")
    talk = [{"role": "user", "content": "river"}, {"role": "assistant", "content": first}]
    with serving(tmp_path / "run") as server:
        for messages, expected in (
            (talk[:1], first),
            ([*talk, {"role": "user", "content": "stone"}], second),
        ):
            status, answer = ask(server, "POST", "/v1/chat/completions", {"messages": messages})
            assert status == 200 and answer["choices"][0]["message"]["content"] == expected


def test_what_cannot_be_served_is_one_sentence_before_anything_is_read(trained, capsys, monkeypatch):
    words = ["llmjax", f"--workdir={trained}", "--mode=serve", "--config.serve.port=0"]
    monkeypatch.setattr(serve, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refuse(capsys, [*words[:3], f"--config.serve.port={port}"])
    assert f"serve.port={port} cannot be listened at (Address already in use)" in said
    assert "serve.slots=0 must be at least 1" in refuse(capsys, [*words, "--config.serve.slots=0"])
    said = refuse(capsys, [*words, "--config.generate.num_beams=3"])
    assert "generate.num_beams=3 is without effect for --mode=serve" in said
    said = refuse(capsys, [*words, "--config.generate.slots=3"])
    assert "generate.slots=3 is without effect for --mode=serve" in said and "serve.slots" in said
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert "needs the package uvicorn, which is not installed; pip install 'llmjax[serve]'" in refuse(
        capsys, words
    )


@pytest.mark.slow
def test_without_a_key_others_are_let_in_only_with_a_note(trained):
    words = [
        "llmjax",
        f"--workdir={trained}",
        "--mode=serve",
        "--config.serve.port=0",
        "--config.serve.host=0.0.0.0",
    ]
    process = tiny_run.start(words, stderr=subprocess.PIPE)
    assert "is at http://0.0.0.0:" in process.stdout.readline()
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert "serve.host='0.0.0.0' lets others ask without a key; set LLMJAX_API_KEY" in err
    assert process.returncode == 0


@pytest.mark.slow
def test_a_model_that_fills_masks_or_translates_is_not_served(tmp_path, capsys):
    tiny_run.write_corpus(tmp_path / "corpus")
    settings = {**SETTINGS, "model__family": "bert", "task__name": "masked_language_model"}
    assert main.main(tiny_run.command(tmp_path, f"--workdir={tmp_path / 'run'}", **settings)) == 0
    capsys.readouterr()
    said = refuse(
        capsys, ["llmjax", f"--workdir={tmp_path / 'run'}", "--mode=serve", "--config.serve.port=0"]
    )
    assert "task.name='masked_language_model' fills in masks and continues no text" in said


@pytest.mark.parametrize("mesh", often([{}, {"fsdp": 2, "seq": 2}], lambda mesh: not mesh))
def test_on_several_devices_the_engine_writes_what_the_generator_writes(trained, mesh):
    raw = saved_config(trained)
    raw["mesh"] |= mesh
    raw["generate"] |= {"temperature": 0.9, "max_tokens": 12}
    raw["serve"] |= {"slots": 3, "max_context": 64}
    loaded = load(make_request("serve", raw, trained))
    served, expected = serve.make_served(loaded, "run"), Writer(loaded).write(["river"])[0][0]
    engine = serve.make_engine(loaded, served)
    asked = read_completion(
        Fields({"prompt": ["river", "stone", "river"], "n": 2}), served, lambda: raw["generate"]["seed"]
    )
    texts = {
        engine.submit(order): StoppedText(loaded.tokenizer, (), continues=True) for order in asked.orders
    }
    written = dict.fromkeys(texts, "")
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Written) and event.token is not None:
                written[event.order] += texts[event.order].push(event.token)
    found = [written[number] + text.flush() for number, text in texts.items()]
    assert found[0] == found[4] == expected and found[1] == found[5] != expected
