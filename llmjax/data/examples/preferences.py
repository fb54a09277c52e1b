"""Examples for preferences: a prompt with two answers, of which people prefer the first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import ClassVar

from llmjax.data.chat.messages import ASSISTANT, ChatFormat, Message
from llmjax.data.examples.contract import Example
from llmjax.data.examples.conversations import format_for, read_messages, short, with_system
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Two conversations that differ in their last message alone, which the assistant says.

    The preferred one is the stream that is packed, `tokens`, with weight 1 for its answer, and the other is the second
    stream. Both begin with the same tokens of the prompt and end with the end of an answer.

    text_field      the field of a record with the preferred answer: a text, a list that has it as its only message, or
                    a whole conversation
    rejected_field  the same for the other answer
    prompt_field    the field with what stands before both: the text of a user, or a list of messages. "" where both
                    fields above hold whole conversations
    form            preference.format
    system          the system message of conversations that have none; "" for none
    """

    text_field: str
    rejected_field: str
    prompt_field: str
    form: str
    system: str
    version: ClassVar[int] = 2
    further_texts: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ("weights", "source")

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for name in (self.text_field, self.rejected_field, self.prompt_field) if name)

    @property
    def structured(self) -> tuple[str, ...]:
        return self.fields

    def check(self, record: Mapping[str, str | int]) -> None:
        self.read(record)

    def texts(self, record: Mapping[str, str | int]) -> list[str]:
        prompt, chosen, rejected = self.read(record)
        return [*(message.text for message in prompt), chosen, rejected]

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        prompt, *answers = self.read(record)
        form = format_for(self.form, tokenizer)
        (given, chosen), (again, rejected) = (_last_answer(form, prompt, answer) for answer in answers)
        if given != again:
            raise UserError(
                "the chat template writes the prompt of a pair in two ways for its two answers, so that they cannot be "
                "compared; set preference.format to chatml or plain"
            )
        weights = ((len(given), 0.0), (len(chosen), 1.0))
        return Example([*given, *chosen], weights=weights, source=[*given, *rejected])

    def decisive(self, record: Mapping[str, str | int]) -> str:
        """A prompt may have several pairs, and the model has seen it if it was trained on one of them."""
        prompt, _, _ = self.read(record)
        return json.dumps(prompt, ensure_ascii=False)

    def read(self, record: Mapping[str, str | int]) -> tuple[list[Message], str, str]:
        """The messages before the answers, the preferred answer, and the other.

        Raises UserError where there is nothing to compare.
        """
        prompt = self._messages(record, self.prompt_field, "user") if self.prompt_field else []
        both = [self._messages(record, name, ASSISTANT) for name in (self.text_field, self.rejected_field)]
        (*before, chosen), (*others, rejected) = both
        if before != others:
            raise UserError(
                f"the conversations in {self.text_field!r} and {self.rejected_field!r} differ before their last "
                "messages, which alone are compared; cut them after the first message that differs"
            )
        # Conversations often begin with the prompt that is in a field of its own as well.
        prompt = before if prompt and before[: len(prompt)] == prompt else [*prompt, *before]
        if not prompt:
            raise UserError(
                f"a pair has no prompt before its answer {short(chosen.text)!r}; name its field in "
                "preference.prompt_field, or give whole conversations"
            )
        if (chosen.role, rejected.role) != (ASSISTANT, ASSISTANT):
            raise UserError(
                f"a pair ends with messages of {chosen.role!r} and {rejected.role!r}; both are to be answers of "
                f"{ASSISTANT!r}"
            )
        if chosen.text == rejected.text:
            raise UserError(
                f"both answers of a pair are {short(chosen.text)!r}, so that neither is preferred; leave it out"
            )
        return with_system(prompt, self.system), chosen.text, rejected.text

    def _messages(self, record: Mapping[str, str | int], name: str, role: str) -> list[Message]:
        """The messages in a field: those of a list, or one of `role`."""
        text = str(record[name])
        if not text.strip():
            raise UserError(f"the field {name!r} of a pair has no text; leave the pair out")
        return read_messages(text) or [Message(role, text)]


def _last_answer(form: ChatFormat, prompt: list[Message], answer: str) -> tuple[list[int], list[int]]:
    """The ids of a conversation up to its last message, which is `answer`, and those of the answer with its end."""
    ids, runs, _ = form.encode([*prompt, Message(ASSISTANT, answer)])
    # What follows the end of an answer is not learned, and not compared.
    behind = runs[-1][0] if not runs[-1][1] else 0
    last = runs[-1] if not behind else runs[-2]
    stop = len(ids) - behind
    return ids[: stop - last[0]], ids[stop - last[0] : stop]
