"""The formats of conversations: marks around each message, of llmjax or of ChatML, or the template of a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from llmjax.data.chat.messages import ASSISTANT, ROLES, ChatFormat, Message, Spoken, special_ids
from llmjax.data.chat.template_format import TemplateFormat
from llmjax.data.tokenizer.tokenizer import TEMPLATE_FILE, Tokenizer
from llmjax.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class MarkedFormat:
    """The marks of a format, as ids of a tokenizer.

    tokenizer  encodes the texts
    begin      what a conversation begins with
    opening    what stands before a message of each role
    end        what ends a message of the assistant, and tells generation to stop
    closing    what stands after a message of each role, `end` not included
    """

    tokenizer: Tokenizer
    begin: tuple[int, ...]
    opening: Mapping[str, tuple[int, ...]]
    end: int
    closing: Mapping[str, tuple[int, ...]]

    def encode(self, messages: Sequence[Message]) -> Spoken:
        ids, runs, turns = list(self.begin), [(len(self.begin), 0.0)], list[int]()
        for number, message in enumerate(messages):
            if number and messages[number - 1].role == ASSISTANT:
                turns.append(len(ids))
            opening, text = self.opening[message.role], message.text
            said = [*self.tokenizer.encode(text), *([self.end] if message.role == ASSISTANT else [])]
            ids += [*opening, *said, *self.closing[message.role]]
            weight = 1.0 if message.role == ASSISTANT else 0.0
            runs += [(len(opening), 0.0), (len(said), weight), (len(self.closing[message.role]), 0.0)]
        return Spoken(ids, [run for run in runs if run[0]], turns)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        return [*self.encode(messages).ids, *self.opening[ASSISTANT]]


def _plain(tokenizer: Tokenizer) -> ChatFormat:
    """The first reserved ids stand for the roles. The end of a text ends an answer."""
    if len(tokenizer.reserved_ids) < len(ROLES):
        raise UserError(
            f"conversation.format='plain' needs {len(ROLES)} reserved ids for the roles, and the tokenizer has "
            f"{len(tokenizer.reserved_ids)}; raise tokenizer.num_reserved of one that is trained here, or give another "
            "tokenizer.path"
        )
    opening = {role: (tokenizer.reserved_ids[i],) for i, role in enumerate(ROLES)}
    return MarkedFormat(tokenizer, (tokenizer.bos_id,), opening, tokenizer.eos_id, dict.fromkeys(ROLES, ()))


# The marks of ChatML, which Qwen, SmolLM2 and many others were trained with.
CHATML = ("<|im_start|>", "<|im_end|>")


def _chatml(tokenizer: Tokenizer) -> ChatFormat:
    special = special_ids(tokenizer)
    missing = [mark for mark in CHATML if mark not in special]
    if missing:
        raise UserError(
            f"conversation.format='chatml' needs the special token {missing[0]!r}, which the tokenizer does not have; "
            "use plain, or a tokenizer that has it"
        )
    start, end = (special[mark] for mark in CHATML)
    opening = {role: (start, *tokenizer.encode(f"{role}\n", continues=True)) for role in ROLES}
    newline = tuple(tokenizer.encode("\n", continues=True))
    closing = {role: (newline if role == ASSISTANT else (end, *newline)) for role in ROLES}
    return MarkedFormat(tokenizer, (), opening, end, closing)


def _template(tokenizer: Tokenizer) -> ChatFormat:
    if not tokenizer.chat_template:
        raise UserError(
            f"conversation.format='template' needs a chat template ({TEMPLATE_FILE}) beside the tokenizer, and there "
            "is none; use chatml or plain"
        )
    return TemplateFormat(tokenizer, special_ids(tokenizer))


def _auto(tokenizer: Tokenizer) -> ChatFormat:
    """The template of the tokenizer if it has one, otherwise ChatML where it has its marks."""
    if tokenizer.chat_template:
        return _template(tokenizer)
    return (_chatml if set(CHATML) <= special_ids(tokenizer).keys() else _plain)(tokenizer)


# The values of conversation.format.
FORMATS: dict[str, Callable[[Tokenizer], ChatFormat]] = {
    "auto": _auto,
    "plain": _plain,
    "chatml": _chatml,
    "template": _template,
}


def make_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format for conversation.format=`name`. Raises UserError if the tokenizer lacks its marks."""
    return choose(FORMATS, "conversation.format", name)(tokenizer)
