"""Answers as JSON objects, in the form of OpenAI's API."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from llmjax.data.tokenizer.tokenizer import StreamDecoder, Tokenizer
from llmjax.generate.engine import Score
from llmjax.serve.asked import Asked
from llmjax.serve.worker import Piece

# What OpenAI's API tells in place of a log-probability that is no number of JSON.
UNLIKELY = -9999.0


@dataclasses.dataclass
class Choice:
    """One of the texts of an answer, as it is written so far."""

    index: int
    text: str = ""
    tokens: list[tuple[int, Score]] = dataclasses.field(default_factory=list)
    prompt: tuple[Score, ...] = ()
    end: str = ""

    def add(self, piece: Piece) -> None:
        """Adds what is new."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.prompt, self.end = self.prompt or piece.prompt, piece.end


class Form:
    """The objects of one answer: `whole` for all texts at once, or `begin`, `part` and `usage_part` of a stream.

    chat  whether they are those of `/v1/chat/completions`
    """

    def __init__(self, asked: Asked, tokenizer: Tokenizer, model: str, chat: bool):
        self._asked, self._tokenizer, self._chat = asked, tokenizer, chat
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        # Where the logarithms of a stream go on, for each choice.
        self._places = [_Places(tokenizer, continues) for continues in asked.continues]

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer with all of its texts."""
        found = []
        for choice in choices:
            logprobs = self._logprobs(choice, begins=True)
            if self._chat:
                told: dict[str, Any] = {
                    "message": {"role": "assistant", "content": choice.text, "refusal": None}
                }
            else:
                told = {"text": self._given(choice) + choice.text}
            found.append({"index": choice.index, **told, "logprobs": logprobs, "finish_reason": choice.end})
        kind = "chat.completion" if self._chat else "text_completion"
        new = sum(len(choice.tokens) for choice in choices)
        return {**self._common, "object": kind, "choices": found, "usage": self._usage(new)}

    def begin(self, choice: Choice) -> dict[str, Any] | None:
        """The first part of a stream for a text, if there is one before the text begins."""
        if self._chat:
            return self._part(choice.index, {"delta": {"role": "assistant", "content": ""}}, None, None)
        if not self._asked.echo:
            return None
        # The prompt, and its log-probabilities.
        return self._part(
            choice.index, {"text": self._given(choice)}, self._logprobs(choice, begins=True), None
        )

    def part(self, choice: Choice) -> dict[str, Any]:
        """A part of a stream, with what `choice` has of new text and tokens."""
        logprobs, end = self._logprobs(choice, begins=False), choice.end or None
        if not self._chat:
            return self._part(choice.index, {"text": choice.text}, logprobs, end)
        delta = {"content": choice.text} if choice.text or choice.tokens else {}
        return self._part(choice.index, {"delta": delta}, logprobs, end)

    def usage_part(self, new_tokens: int) -> dict[str, Any]:
        """The last part of a stream, where it is asked for: how many tokens there were."""
        return {**self._common, "object": self._kind_of_part, "choices": [], "usage": self._usage(new_tokens)}

    @property
    def _kind_of_part(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _part(self, index: int, told: dict[str, Any], logprobs: Any, end: str | None) -> dict[str, Any]:
        choice = {"index": index, **told, "logprobs": logprobs, "finish_reason": end}
        usage = {"usage": None} if self._asked.stream_usage else {}
        return {**self._common, "object": self._kind_of_part, "choices": [choice], **usage}

    def _usage(self, new_tokens: int) -> dict[str, int]:
        read = self._asked.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": new_tokens, "total_tokens": read + new_tokens}

    def _given(self, choice: Choice) -> str:
        """The prompt, where it is told again."""
        return self._asked.texts[choice.index] if self._asked.echo else ""

    def _logprobs(self, choice: Choice, begins: bool) -> dict[str, Any] | None:
        """The log-probabilities of the tokens of a choice; those of the prompt come first where it begins."""
        asked, places = self._asked, self._places[choice.index]
        if asked.logprobs is None:
            return None
        if self._chat:
            return {"content": [self._entry(*pair) for pair in choice.tokens], "refusal": None}
        tokens: list[tuple[int, Score | None]] = []
        if begins and asked.echo:
            prompt = asked.orders[choice.index].prompt
            places.begin(self._tokenizer, prompt)
            tokens += zip(prompt, (None, *choice.prompt), strict=True)
        tokens += choice.tokens
        told: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, score in tokens:
            told["tokens"].append(self._name(token))
            told["token_logprobs"].append(None if score is None else _finite(score.logprob))
            told["top_logprobs"].append(None if score is None else self._top(token, score))
            told["text_offset"].append(places.of(token))
        return {**told, "top_logprobs": told["top_logprobs"] if asked.logprobs else None}

    def _top(self, token: int, score: Score) -> dict[str, float]:
        """{token: log-probability} of the likeliest, and of the one that was drawn."""
        top: dict[str, float] = {}
        # Of ids with the same name, the likeliest is told: it comes first.
        for other, logprob in [*score.top, (token, score.logprob)]:
            top.setdefault(self._name(other), _finite(logprob))
        return top

    def _name(self, token: int) -> str:
        """A token as OpenAI's API names it: its text, or its bytes where they are not whole characters."""
        data = self._tokenizer.id_to_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _entry(self, token: int, score: Score) -> dict[str, Any]:
        """A token with its log-probability and the likeliest others, as chats tell them."""
        top = [self._token(*pair) for pair in score.top]
        return {**self._token(token, score.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = list(self._tokenizer.id_to_bytes(token))
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": data}


class _Places:
    """Where the tokens of a text begin in it, counted in characters."""

    def __init__(self, tokenizer: Tokenizer, continues: bool):
        self._decoder, self._length = StreamDecoder(tokenizer, continues), 0

    def begin(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """The text begins with the prompt."""
        self._decoder = StreamDecoder(tokenizer, continues=prompt[0] != tokenizer.bos_id)

    def of(self, token: int) -> int:
        """The place of the next token."""
        place = self._length
        self._length += len(self._decoder.push(token))
        return place


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else UNLIKELY
