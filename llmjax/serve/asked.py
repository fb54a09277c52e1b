"""What requests ask for: JSON fields become orders for the engine, before anything is computed."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmjax.data.chat.messages import ROLES, ChatFormat, Message
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.generate.engine import Order, Sampling
from llmjax.generate.generate import GenerateConfig
from llmjax.generate.slots import MOST_TOP
from llmjax.serve.config import ServeConfig
from llmjax.serve.errors import TOO_LONG, ApiError
from llmjax.serve.fields import Fields, check_text, short, wrong

# The most stop strings of a request. A choice: each is looked for at every token.
MOST_STOPS = 16
# Fields of OpenAI's API that change nothing of a text.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields of it that are not heeded, and the values of them that say so.
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
NEUTRAL_TEXT = {"suffix": ""}
NEUTRAL_CHAT = {
    "tools": [], "functions": [], "tool_choice": "none", "function_call": "none", "parallel_tool_calls": True,
    "response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": "none",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server serves.

    name        of the model, which requests give
    created     seconds since 1970, as `/v1/models` tells them
    defaults    what a request does not say, such as temperature
    config      addresses and limits
    context     the most tokens of a prompt and its answer
    embed       float32 [texts, D] of some texts
    embed_size  the tokens of a text as `embed` reads it, and the most that it reads
    format      of conversations; None, and `no_chat` the reason, for a model that does not chat
    system      the system message of conversations that have none; "" for none
    """

    name: str
    created: int
    tokenizer: Tokenizer
    defaults: GenerateConfig
    config: ServeConfig
    context: int
    embed: Callable[[Sequence[str]], np.ndarray]
    embed_size: Callable[[str], tuple[int, int]]
    format: ChatFormat | None = None
    no_chat: str = ""
    system: str = ""

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text: that of a document, and that of an answer."""
        return (self.tokenizer.eos_id, *(() if self.format is None else (self.format.end,)))


@dataclasses.dataclass(frozen=True)
class Asked:
    """The texts that a request asks for.

    orders       `count` for each prompt, those of the first prompt first
    texts        the text of the prompt of each order, where it is told
    logprobs     the number of log-probabilities that are told of each place; None for none at all
    continues    for each order, whether the new text goes on with one, so that a space at its beginning belongs to it
    """

    orders: tuple[Order, ...]
    texts: tuple[str, ...]
    stops: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    stream_usage: bool
    continues: tuple[bool, ...]

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts, each counted once."""
        return sum(len(order.prompt) for order in self.orders if order.sampling.number == 0)


def read_completion(fields: Fields, served: Served, new_seed: Callable[[], int]) -> Asked:
    """The texts that a body of `/v1/completions` asks for; `new_seed` gives that of a request that has none."""
    tokenizer = served.tokenizer
    prompts = [
        ([tokenizer.bos_id, *tokenizer.encode(prompt)], prompt)
        if isinstance(prompt, str)
        else (prompt, _text_of(prompt, tokenizer))
        for prompt in _prompts(fields.any("prompt", ""), served)
    ]
    echo = fields.flag("echo")
    logprobs = None if fields.any("logprobs") is None else fields.integer("logprobs", 0, 0, MOST_TOP)
    count = fields.integer("n", 1, 1, 1024)
    fields.refuse({**NEUTRAL_TEXT, "best_of": count})
    most = served.config.max_text_tokens
    max_tokens = fields.integer("max_tokens", min(served.defaults.max_tokens, most), 0 if echo else 1, most)
    order = Order((), max_tokens, top=logprobs, echo=echo and logprobs is not None, ends=served.ends)
    return _asked(fields, served, new_seed, order, prompts, count, logprobs, echo)


def read_chat(fields: Fields, served: Served, new_seed: Callable[[], int]) -> Asked:
    """The answers that a body of `/v1/chat/completions` asks for."""
    if served.format is None:
        raise ApiError(400, served.no_chat)
    messages = _messages(fields.any("messages"))
    if served.system and messages[0].role != "system":
        messages = [Message("system", served.system), *messages]
    prompt = served.format.encode_prompt(messages)
    tells, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 0, MOST_TOP)
    if top and not tells:
        raise ApiError(400, f"top_logprobs={top} needs logprobs=true; set it too", param="top_logprobs")
    count, most = fields.integer("n", 1, 1, 1024), served.config.max_text_tokens
    fields.refuse(NEUTRAL_CHAT)
    default = min(served.defaults.max_tokens, most)
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in fields]
    if len(names) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens say the same; send one", param="max_tokens")
    max_tokens = fields.integer(names[0] if names else "max_tokens", default, 1, most)
    order = Order((), max_tokens, top=top if tells else None, ends=served.ends)
    logprobs = top if tells else None
    return _asked(fields, served, new_seed, order, [(prompt, "")], count, logprobs, False)


def read_embeddings(fields: Fields, served: Served) -> tuple[list[str], bool]:
    """The texts of a body of `/v1/embeddings`, and whether their vectors are told in base64."""
    value = fields.any("input")
    texts = [value] if isinstance(value, str) else value
    most = served.config.slots + served.config.max_queue
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise wrong("input", value, "a text or a list of texts")
    if len(texts) > most:
        raise ApiError(400, f"input has {len(texts)} texts; send at most {most} at once", param="input")
    for text in texts:
        check_text(text, "input")
    encoding = fields.any("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise wrong("encoding_format", encoding, "float or base64")
    fields.refuse({"dimensions": None})
    _finish(fields, served)
    return texts, encoding == "base64"


def vector_as(vector_D: np.ndarray, in_base64: bool) -> str | list[float]:
    """A vector as a body tells it: numbers, or the base64 of float32 in little-endian order."""
    if in_base64:
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector_D]


def check_length(tokens: int, served: Served, param: str) -> None:
    """ApiError for a prompt that is longer than the model holds."""
    if tokens > served.context:
        raise ApiError(
            400,
            f"the prompt has {tokens:,} tokens, and the model holds {served.context:,} with the answer; shorten it",
            code=TOO_LONG,
            param=param,
        )


def _asked(
    fields: Fields,
    served: Served,
    new_seed: Callable[[], int],
    order: Order,
    prompts: Sequence[tuple[Sequence[int], str]],
    count: int,
    logprobs: int | None,
    echo: bool,
) -> Asked:
    """Reads what both kinds of texts have in common. `order` has all but the prompt and the sampling."""
    most = served.config.slots + served.config.max_queue
    if len(prompts) * count > most:
        raise ApiError(
            400,
            f"the request asks for {len(prompts) * count} texts; ask for at most {most} at once",
            param="n",
        )
    for prompt, _ in prompts:
        check_length(len(prompt), served, "messages" if "messages" in fields else "prompt")
    defaults = served.defaults
    sampling = Sampling(
        temperature=fields.number("temperature", defaults.temperature, 0, 1e4),
        top_k=max(fields.integer("top_k", defaults.top_k, -1, 2**24), 0),
        # The smallest normal float32: a probability below it would be 0 on the device.
        top_p=max(fields.number("top_p", defaults.top_p, 0, 1), 1.2e-38),
        min_p=fields.number("min_p", defaults.min_p, 0, 1),
        repetition_penalty=fields.number("repetition_penalty", defaults.repetition_penalty, 1e-4, 1e4),
        seed=fields.integer("seed", 0, 0, 2**63 - 1) if "seed" in fields else new_seed(),
    )
    stops = fields.texts("stop", MOST_STOPS) if "stop" in fields else defaults.stop
    options = fields.inner("stream_options")
    stream, usage = fields.flag("stream"), options.flag("include_usage")
    options.ignore(("include_obfuscation",))
    options.finish()
    fields.refuse(NEUTRAL)
    _finish(fields, served)
    orders = tuple(
        dataclasses.replace(
            order, prompt=tuple(prompt), sampling=dataclasses.replace(sampling, number=number)
        )
        for prompt, _ in prompts
        for number in range(count)
    )
    texts = tuple(text for _, text in prompts for _ in range(count))
    continues = tuple("messages" in fields or bool(text) for text in texts)
    return Asked(orders, texts, tuple(stops), logprobs, echo, stream, usage, continues)


def _finish(fields: Fields, served: Served) -> None:
    """The fields that every request has, and a refusal of those that nobody knows."""
    name = fields.text("model", served.name)
    if name != served.name:
        raise ApiError(
            404,
            f"the model {short(name)} is not here; use {served.name!r}",
            code="model_not_found",
            param="model",
        )
    fields.ignore(IGNORED)
    fields.finish()


def _prompts(value: Any, served: Served) -> list[Any]:
    """The prompts of a completion: a text or the ids of one, or a list of either."""
    prompts = (
        [value]
        if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0]))
        else value
    )
    most = served.config.slots + served.config.max_queue
    if not isinstance(prompts, list) or not 0 < len(prompts) <= most:
        raise wrong("prompt", value, f"a text, a list of ids, or a list of at most {most} of these")
    for prompt in prompts:
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
        elif not isinstance(prompt, list) or not prompt or not all(map(_is_id, prompt)):
            raise wrong("prompt", prompt, "a text or a list of ids")
        elif not all(0 <= i < served.tokenizer.vocab_size for i in prompt):
            raise ApiError(
                400,
                f"a prompt has an id outside of 0 to {served.tokenizer.vocab_size - 1}; correct it",
                param="prompt",
            )
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of a prompt that was given as ids."""
    return tokenizer.decode(ids, continues=ids[0] != tokenizer.bos_id)


def _messages(value: Any) -> list[Message]:
    """The messages of a conversation that the assistant is to answer."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, 'a list of objects with "role" and "content"')
    messages = [_message(item) for item in value]
    if messages[-1].role != "user":
        raise ApiError(
            400, "the last message is not of the user; end with what is to be answered", param="messages"
        )
    return messages


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise wrong("messages", value, 'a list of objects with "role" and "content"')
    role, content = value.get("role"), value.get("content")
    # OpenAI's newer name of the system.
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ApiError(
            400, f"role={short(role)} is not known; use one of {', '.join(ROLES)}", param="messages"
        )
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(content):
            raise ApiError(400, "a message has a part that is no text; send texts alone", param="messages")
        content = "".join(check_text(part.get("text"), "content") for part in parts)
    # Clients send earlier messages back with fields that say nothing.
    unknown = [
        name
        for name in value
        if name not in ("role", "content", "name") and value[name] not in (None, [], {})
    ]
    if unknown:
        raise ApiError(400, f"a message has the field {short(unknown[0])}, which is not known; leave it out")
    return Message(role, check_text(content, "content"))
