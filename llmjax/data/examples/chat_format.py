"""How a conversation becomes tokens: marks around each message, and what of it a model learns to write.

The text of a message never becomes a mark, whatever it spells: marks are ids, and text is encoded as text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError, choose

# Who may speak. Every mark of a format is for one of them.
ROLES = ("system", "user", "assistant")
ASSISTANT = "assistant"


class Message(NamedTuple):
    """What one side of a conversation said."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class ChatFormat:
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

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, float]]]:
        """The ids of a conversation, and runs of (number of ids, loss weight): 1 for what the assistant says and for
        its end, 0 for everything else."""
        ids, runs = list(self.begin), [(len(self.begin), 0.0)]
        for message in messages:
            opening, text = self.opening[message.role], self.tokenizer.encode(message.text)
            said = [*text, self.end] if message.role == ASSISTANT else text
            ids += [*opening, *said, *self.closing[message.role]]
            weight = 1.0 if message.role == ASSISTANT else 0.0
            runs += [(len(opening), 0.0), (len(said), weight), (len(self.closing[message.role]), 0.0)]
        return ids, [run for run in runs if run[0]]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant's answer follows."""
        return [*self.encode(messages)[0], *self.opening[ASSISTANT]]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of a tokenizer that no text gives, by the names of their pieces, if it has such names."""
    piece: Callable[[int], str] | None = getattr(tokenizer, "piece", None)
    own = (*tokenizer.reserved_ids, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    return {} if piece is None else {piece(i): i for i in own}


def _plain(tokenizer: Tokenizer) -> ChatFormat:
    """The first reserved ids stand for the roles. The end of a text ends an answer."""
    if len(tokenizer.reserved_ids) < len(ROLES):
        raise UserError(
            f"conversation.format='plain' needs {len(ROLES)} reserved ids for the roles, and the tokenizer has "
            f"{len(tokenizer.reserved_ids)}; raise tokenizer.num_reserved of one that is trained here, or give another "
            "tokenizer.path"
        )
    opening = {role: (tokenizer.reserved_ids[i],) for i, role in enumerate(ROLES)}
    return ChatFormat(tokenizer, (tokenizer.bos_id,), opening, tokenizer.eos_id, dict.fromkeys(ROLES, ()))


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
    return ChatFormat(tokenizer, (), opening, end, closing)


def _auto(tokenizer: Tokenizer) -> ChatFormat:
    """ChatML where the tokenizer has its marks."""
    return (_chatml if set(CHATML) <= special_ids(tokenizer).keys() else _plain)(tokenizer)


# The values of conversation.format.
FORMATS: dict[str, Callable[[Tokenizer], ChatFormat]] = {"auto": _auto, "plain": _plain, "chatml": _chatml}


def make_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format for conversation.format=`name`. Raises UserError if the tokenizer lacks its marks."""
    return choose(FORMATS, "conversation.format", name)(tokenizer)
