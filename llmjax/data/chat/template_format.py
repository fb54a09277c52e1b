"""Conversations as the chat template of a tokenizer writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmjax.data.chat.messages import ASSISTANT, Message, Runs, Spoken
from llmjax.data.chat.template import Template, TemplateError
from llmjax.data.tokenizer.tokenizer import Tokenizer

# A character of private use, which is put inside of what a message spells like a special token while the template runs.
GUARD = "\ue000"
# The special tokens that templates ask for, and our names for their ids.
NAMED = ("bos", "eos", "pad", "unk")


class TemplateFormat:
    """The format that `tokenizer.chat_template` describes, see `ChatFormat`.

    What the template writes itself may name special tokens, and gives their ids. What a message says never does.

    Args:
      tokenizer: has the template, and encodes the text.
      special: the ids of its special tokens, by their names.
    """

    def __init__(self, tokenizer: Tokenizer, special: Mapping[str, int]):
        self._tokenizer, self._template = tokenizer, Template(tokenizer.chat_template)
        # A guard stands between two characters.
        self._special = {name: i for name, i in special.items() if len(name) > 1}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._tokens = _named_tokens(tokenizer, self._special)
        self.end = self._find_end()

    def _find_end(self) -> int:
        """The first special token after an answer; where there is none, the end of a text."""
        said = [Message("user", "a"), Message(ASSISTANT, "answer")]
        before, whole = self._render(said[:1], answer=True), self._render(said)
        mark = self._marks.search(whole, max(whole.rfind("answer"), len(before)))
        return self._special[mark[0]] if mark else self._tokenizer.eos_id

    def encode(self, messages: Sequence[Message]) -> Spoken:
        messages, guard = self._guarded(messages)
        whole, at, ids, runs, turns = self._render(messages), 0, list[int](), Runs(), list[int]()

        def add(text: str, is_answer: bool) -> None:
            found = self._ids(text, guard, ids[-1:])
            learned = found.index(self.end) + 1 if is_answer and self.end in found else len(found) * is_answer
            ids.extend(found)
            runs.extend([(learned, 1.0), (len(found) - learned, 0.0)])

        for number, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            before, after = self._answer(messages, number, whole)
            add(whole[at:before], False)
            add(whole[before:after], True)
            at = after
            if number + 1 < len(messages):
                turns.append(len(ids))
        add(whole[at:], False)
        return Spoken(ids, [run for run in runs if run[0]], turns)

    def _answer(self, messages: Sequence[Message], number: int, whole: str) -> tuple[int, int]:
        """Where in `whole`, the text of all messages, the answer of message `number` begins and where it ends.

        Raises TemplateError where the template writes something else once more follows, or before an answer.
        """
        before = self._render(messages[:number], answer=True)
        after = self._render(messages[: number + 1])
        way_out = "; set the format of conversations to chatml or plain"
        if not after.startswith(before):
            raise TemplateError(
                f"the chat template asks for message {number + 1} otherwise than it writes it, so that nobody can say "
                f"which tokens the assistant wrote{way_out}"
            )
        # Some templates end a text with a token that goes away when more follows.
        differs = (i for i, (a, b) in enumerate(zip(whole, after)) if a != b)
        end = next(differs, min(len(whole), len(after)))
        said, text = after[len(before) :], messages[number].text.strip()
        if end < len(after) and (text not in said or text not in after[len(before) : end]):
            raise TemplateError(
                f"the chat template writes message {number + 1} otherwise when more follows, so that nobody can say "
                f"which tokens the assistant wrote{way_out}"
            )
        return len(before), end

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        messages, guard = self._guarded(messages)
        return self._ids(self._render(messages, answer=True), guard)

    def _render(self, messages: Sequence[Message], answer: bool = False) -> str:
        said = [{"role": message.role, "content": message.text} for message in messages]
        return self._template.render(said, answer=answer, tokens=self._tokens)

    def _guarded(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """The messages with a guard in what spells a special token, and the guard, which no message has itself."""
        longest = max((len(run) for m in messages for run in re.findall(f"{GUARD}+", m.text)), default=0)
        guard = GUARD * (longest + 1)

        def guarded(found: re.Match) -> str:
            return f"{found[0][0]}{guard}{found[0][1:]}"

        return [Message(m.role, self._marks.sub(guarded, m.text)) for m in messages], guard

    def _ids(self, text: str, guard: str, before: Sequence[int] = ()) -> list[int]:
        """The ids of a text that the template wrote, or of a part of it; `before` has the id before it, if any."""
        ids, at = [*before], 0
        for mark in [*self._marks.finditer(text), None]:
            part = text[at : mark.start() if mark else len(text)].replace(guard, "")
            if part:
                # Some tokenizers put a space before what follows a special token, as before a whole text.
                begins = not ids or (self._tokenizer.prefixes_parts and ids[-1] in self._special.values())
                ids += self._tokenizer.encode(part, continues=not begins)
            if mark:
                ids.append(self._special[mark[0]])
                at = mark.end()
        return ids[len(before) :]


def _named_tokens(tokenizer: Tokenizer, special: Mapping[str, int]) -> dict[str, str]:
    """The texts of special tokens by the names that templates have for them, those that the tokenizer has."""
    texts = {i: name for name, i in special.items()}
    # A tokenizer of Hugging Face says which it has. Another one without a token has the id of another in its place.
    said = getattr(tokenizer, "special", None)
    ids = {
        name: getattr(tokenizer if said is None else said, f"{name}_id" if said is None else name)
        for name in NAMED
    }
    if said is None and ids["bos"] == ids["pad"]:
        del ids["bos"]
    return {f"{name}_token": texts[i] for name, i in ids.items() if i in texts}
