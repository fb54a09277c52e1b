"""Conversations, and the contract for a format in which they become tokens.

The text of a message never becomes a mark, whatever it spells: marks are ids, and text is encoded as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from llmjax.data.tokenizer.tokenizer import Tokenizer

# Who may speak. Every mark of a format is for one of them.
ROLES = ("system", "user", "assistant")
ASSISTANT = "assistant"


class Message(NamedTuple):
    """What one side of a conversation said."""

    role: str
    text: str


# (number of ids, loss weight)
Runs = list[tuple[int, float]]


class Spoken(NamedTuple):
    """A conversation as ids.

    ids    of all marks and texts
    runs   (number of ids, loss weight): 1 for what the assistant says and for its end, 0 for everything else
    turns  where each message that follows an answer begins, which is where a conversation may be cut in two
    """

    ids: list[int]
    runs: Runs
    turns: list[int]


class ChatFormat(Protocol):
    """How a conversation becomes ids of a tokenizer."""

    @property
    def end(self) -> int:
        """What ends a message of the assistant, and tells generation to stop."""

    def encode(self, messages: Sequence[Message]) -> Spoken:
        """The ids of a conversation."""

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant's answer follows."""


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of a tokenizer that no text gives, by the names of their pieces, if it has such names."""
    piece: Callable[[int], str] | None = getattr(tokenizer, "piece", None)
    own = (*tokenizer.reserved_ids, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    return {} if piece is None else {piece(i): i for i in own}
