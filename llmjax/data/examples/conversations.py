"""Examples for dialogue: whole conversations, of which the model learns what the assistant says."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from llmjax.data.chat.formats import make_format
from llmjax.data.chat.messages import ASSISTANT, ROLES, ChatFormat, Message
from llmjax.data.examples.contract import Example
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError

# Other names of the roles, as data sets have them (ShareGPT).
SAME_ROLE = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT}
# The names of the two fields of a message, in OpenAI's form and in that of ShareGPT.
FIELD_NAMES = (("role", "content"), ("from", "value"))
# The most of a conversation that an error shows.
SHOWN = 80


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Examples of whole conversations, in the marks of a chat format.

    text_field  the field of a record that holds the messages: a list of {"role": ..., "content": ...}, of
                {"from": ..., "value": ...}, or of texts, which the user and the assistant say in turn
    form        conversation.format
    system      the system message of conversations that have none; "" for none
    """

    text_field: str
    form: str
    system: str
    version: ClassVar[int] = 2
    further_texts: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ("weights", "turns")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    @property
    def structured(self) -> tuple[str, ...]:
        return self.fields

    def check(self, record: Mapping[str, str | int]) -> None:
        self.read(str(record[self.text_field]))

    def texts(self, record: Mapping[str, str | int]) -> list[str]:
        return [message.text for message in self.read(str(record[self.text_field]))]

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        messages = self.read(str(record[self.text_field]))
        spoken = format_for(self.form, tokenizer).encode(messages)
        return Example(spoken.ids, weights=tuple(spoken.runs), turns=tuple(spoken.turns))

    def read(self, text: str) -> list[Message]:
        """The messages of a conversation in JSON. Raises UserError for one from which nothing could be learned."""
        messages = [_message(value, number) for number, value in enumerate(_list(text))]
        if not any(message.role == ASSISTANT for message in messages):
            raise UserError(
                f"a conversation has no message of the assistant, so that nothing of it could be learned: "
                f"{short(text)}; leave it out, or correct its roles"
            )
        if all(message.role == ASSISTANT for message in messages):
            raise UserError(
                f"a conversation has no message that the assistant answers, so that all of it would be learned: "
                f"{short(text)}; give what was asked, or learn it as a text with task.name=language_model"
            )
        return with_system(messages, self.system)


def with_system(messages: list[Message], system: str) -> list[Message]:
    """The messages after the message `system`, unless it is empty or they have a system message of their own."""
    begins = messages and messages[0].role == "system"
    return messages if begins or not system else [Message("system", system), *messages]


def read_messages(text: str) -> list[Message] | None:
    """The messages of a list of objects in JSON, {"role": ..., "content": ...} or {"from": ..., "value": ...}; None
    where `text` is no such list. Raises UserError for a message without text or without a known role."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or not values:
        return None
    if all(isinstance(value, str) for value in values):
        raise UserError(
            f"{short(text)} is a list of texts that does not say who says them; write "
            '[{"role": "assistant", "content": "..."}]'
        )
    if not all(isinstance(value, dict) for value in values):
        return None
    return [_message(value, number) for number, value in enumerate(values)]


def format_for(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format `name` in the ids of `tokenizer`, made once for all records."""
    as_key: Any = tokenizer
    return _format(name, as_key)


# A format looks through all pieces of a tokenizer, which is the same object for all records.
@functools.lru_cache(maxsize=4)
def _format(name: str, tokenizer: Any) -> ChatFormat:
    return make_format(name, tokenizer)


def _list(text: str) -> list[Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not values:
        raise UserError(
            f'a conversation is no list of messages: {short(text)}; write [{{"role": "user", "content": "..."}}, ...]'
        )
    return values


def _message(value: Any, number: int) -> Message:
    """One message. Texts without a role are said by the user and by the assistant in turn."""
    role: Any = ROLES[1 + number % 2]
    text: Any = value
    if isinstance(value, dict):
        named = [(value[a], value[b]) for a, b in FIELD_NAMES if a in value and b in value]
        role, text = named[0] if named else (None, None)
    role = SAME_ROLE.get(role, role) if isinstance(role, str) else None
    if role not in ROLES or not isinstance(text, str) or not text.strip():
        raise UserError(
            f"message {number + 1} of a conversation, {short(json.dumps(value, ensure_ascii=False))}, has no text or "
            f'no role of {", ".join(ROLES)}; write {{"role": "user", "content": "..."}}'
        )
    return Message(role, text)


def short(text: str) -> str:
    """The beginning of a text, for errors."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
