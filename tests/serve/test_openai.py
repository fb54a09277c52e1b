"""The official client of OpenAI's API drives the server unchanged."""

import time

import pytest

from tests.serve.running import engine, running

pytestmark = pytest.mark.interop
TALK = [{"role": "user", "content": "a river"}]


@pytest.fixture(scope="module")
def server():
    with running(key="secret") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="secret", max_retries=0)
    yield client
    client.close()


def test_models_completions_and_chats(client, server):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    done = client.completions.create(model=model.id, prompt="a river", max_tokens=9, logprobs=2, echo=True)
    assert done.choices[0].text.startswith("a river") and done.usage.completion_tokens == 9
    assert len(done.choices[0].logprobs.token_logprobs) == 8 + 9
    answer = client.chat.completions.create(
        model=model.id, messages=TALK, max_completion_tokens=9, n=2, seed=3, temperature=1, logprobs=True,
        top_logprobs=3, stop=["never"], user="me",
    )  # fmt: skip
    assert len(answer.choices) == 2 and len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    assert answer.choices[0].message.content != answer.choices[1].message.content
    same = client.chat.completions.create(model=model.id, messages=TALK, max_tokens=9, seed=3, temperature=1)
    assert same.choices[0].message.content == answer.choices[0].message.content


def test_streams(client):
    whole = client.chat.completions.create(model="tiny", messages=TALK, temperature=0).choices[0]
    stream = client.chat.completions.create(
        model="tiny", messages=TALK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = stream
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.message.content
    assert parts[-1].choices[0].finish_reason == "length" and last.usage.completion_tokens == 12
    texts = [
        part.choices[0].text for part in client.completions.create(model="tiny", prompt="a", stream=True)
    ]
    assert "".join(texts) == client.completions.create(model="tiny", prompt="a").choices[0].text


def test_a_stream_that_is_closed_frees_its_slot(client, server, monkeypatch):
    step = engine().step
    monkeypatch.setattr(engine(), "step", lambda: time.sleep(0.05) or step())
    stream = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=80, stream=True)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 2
    while not server.engine.is_idle and time.monotonic() < end:
        time.sleep(0.02)
    assert server.engine.is_idle


def test_vectors_come_in_base64_by_themselves(client):
    vectors = client.embeddings.create(model="tiny", input=["a", "春江"])
    assert [entry.embedding for entry in vectors.data] == [
        [1.0, 97.0, 0.25],
        [2.0, float(sum("春江".encode())), 0.25],
    ]


def test_errors_are_those_of_the_client(client, server):
    import openai

    with pytest.raises(openai.NotFoundError, match="the model 'gpt-9' is not here"):
        client.completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError, match="the prompt has 201 tokens") as error:
        client.completions.create(model="tiny", prompt="a" * 200)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="wrong").models.list()
