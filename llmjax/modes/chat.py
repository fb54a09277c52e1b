"""`--mode=chat`: a conversation in the terminal, with a run of the task `conversation` or with imported weights.

Lines are typed, or come through a pipe. `/help` lists the commands; `/exit`, `exit`, `退出` and Ctrl-D leave, and
Ctrl-C stops an answer. Where the conversation grows longer than what the model was trained on, its oldest turns are
left out.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax

from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.data.chat.formats import CHATML, make_format
from llmjax.data.chat.messages import ASSISTANT, ChatFormat, Message, special_ids
from llmjax.errors import UserError
from llmjax.escapes import complain, show
from llmjax.files import write_atomically
from llmjax.generate.generate import make_generator, power_of_two
from llmjax.generate.text import StoppedText, until_stop
from llmjax.modes.generate import Loaded, given_part, load, mode_for, no_text
from llmjax.modes.parts.interactive import Leave, converse
from llmjax.modes.request import Request
from llmjax.tasks.table import conversation_keys
from llmjax.terminal.stages import on_terminal
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Params

HELP = """\
/reset         forget the conversation
/system TEXT   begin anew with this system message; without TEXT, with none
/save FILE     write the conversation as a line of JSON
/help          these lines
/exit          leave; so do exit, 退出 and Ctrl-D"""
HINT = "/help lists the commands, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
# What leaves.
LEAVING = ("/exit", "/quit", "exit", "quit", "退出")


def run(request: Request) -> int:
    """Answers line by line until the end of the input, and returns exit code 0."""
    if jax.process_count() > 1:
        raise UserError(
            "--mode=chat is a conversation in one terminal, and there are several processes; start one"
        )
    config = request.config.generate
    for key, off in (("num_samples", 1), ("num_beams", 1), ("slots", 0)):
        if (value := getattr(config, key)) != off:
            raise UserError(
                f"generate.{key}={value} is without effect for --mode=chat, which gives one answer as it is written; "
                f"leave it at {off}"
            )
    loaded = load(request, on_terminal)
    chat = Chat(loaded)

    def write(number: int, line: str, watch: Watch) -> None:
        if line.strip() in LEAVING:
            raise Leave
        if line.startswith("/"):
            command(chat, line)
            return
        chat.answer(line, watch, lambda text: show(text, end=""))
        show("")

    converse(write, HINT, empty_ends=False)
    return 0


class Chat:
    """A conversation with a loaded checkpoint: what was said, and how the next answer is made.

    messages  what the next answer is made from: all that was said, or the newest turns of it
    said      all that was said since the beginning, or since it was forgotten

    Raises UserError if the model was not trained on conversations.
    """

    def __init__(self, loaded: Loaded):
        program, tokenizer = loaded.program, loaded.tokenizer
        keys = conversation_keys(program.config.task.name, program.config.tasks)
        self._format = check_converses(loaded)
        self._loaded, self._limit = loaded, program.config.data.seq_len
        self._generate = make_generator(
            program.model,
            program.config.generate,
            eos_id=self._format.end,
            banned_ids=[i for i in no_text(tokenizer) if i != self._format.end],
            width_of=power_of_two,
        )
        self._answers = 0
        self.reset(keys.system)

    def reset(self, system: str | None = None) -> None:
        """Forgets what was said. `system` is the new system message, "" for none; None keeps the present one."""
        if system is not None:
            self._system = system
        self.messages = [Message("system", self._system)] if self._system else []
        self.said = list(self.messages)

    def answer(
        self, text: str, watch: Watch = iter, on_text: Callable[[str], None] = lambda text: None
    ) -> str:
        """The assistant's answer to what the user says; `on_text` is called with each piece of it as it comes."""
        messages = [*self.messages, Message("user", text)]
        prompt, messages = self._fit(messages)
        stops = self._loaded.program.config.generate.stop
        decoder, pieces = StoppedText(self._loaded.tokenizer, stops, continues=True), []

        def add(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        # Each answer has a number, so that no two of them are drawn alike.
        number, self._answers = self._answers, self._answers + 1
        for ids in watch(self._generate(self._loaded.params, [prompt], number)):
            if ids[0] is not None:
                add(decoder.push(ids[0]))
            if decoder.stopped:
                break
        add(decoder.flush())
        # An answer that was stopped at once is none, and the next one must not follow on it.
        said = "".join(pieces)
        if said.strip():
            self.messages = [*messages, Message(ASSISTANT, said)]
            self.said += [messages[-1], Message(ASSISTANT, said)]
        return said

    def _fit(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """The prompt for the next answer, and the messages in it. The oldest turns are left out, and said to be, where
        prompt and answer are longer than the rows that the model was trained on."""
        room = self._limit - min(self._loaded.program.config.generate.max_tokens, self._limit // 2)
        kept, dropped = list(messages), 0
        first = int(kept[0].role == "system")
        while len(prompt := self._format.encode_prompt(kept)) > room and len(kept) > first + 1:
            # A turn is what the user said and the answer to it.
            stop = next((i for i in range(first + 1, len(kept)) if kept[i].role == "user"), len(kept) - 1)
            dropped += 1
            del kept[first:stop]
        if len(prompt) > room:
            raise UserError(
                f"the message has {len(prompt):,} tokens, and data.seq_len={self._limit:,} leaves room for {room:,} "
                "before an answer; shorten it, or lower generate.max_tokens"
            )
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            complain(
                f"the oldest {turns} left out: the conversation is longer than data.seq_len={self._limit:,}"
            )
        return prompt, kept


def check_converses(loaded: Loaded) -> ChatFormat:
    """The format of the model's conversations. UserError if the model was not trained on any."""
    program, tokenizer = loaded.program, loaded.tokenizer
    keys = conversation_keys(program.config.task.name, program.config.tasks)
    trained = program.task.use == "chat"
    # Imported weights may have been trained elsewhere, which shows in their tokenizer.
    known = bool(tokenizer.chat_template) or set(CHATML) <= special_ids(tokenizer).keys()
    if not trained and not (program.task.use == "generate" and known):
        raise UserError(
            f"task.name={program.config.task.name!r} learns no conversation; use {mode_for(program)}, or train "
            "a model with task.name=conversation"
        )
    return make_format(keys.format, tokenizer)


def command(chat: Chat, line: str) -> None:
    """Does what a line that begins with / asks for."""
    name, _, rest = line.strip().partition(" ")
    if name == "/reset":
        chat.reset()
    elif name == "/system":
        chat.reset(rest.strip())
    elif name == "/save":
        save(chat.said, rest.strip())
    elif name == "/help":
        show(HELP)
    else:
        raise UserError(f"{name} is no command; /help lists them")


def save(messages: Sequence[Message], name: str) -> None:
    """Writes the conversation as a line that `task.name=conversation` can train on. No file is overwritten."""
    path = pathlib.Path(name)
    if not name:
        raise UserError("/save needs a file; write /save talk.jsonl")
    if not any(message.role == ASSISTANT for message in messages):
        raise UserError("there is no answer to save yet; ask something first")
    if os.path.lexists(path):
        raise UserError(f"{name!r} exists; give a new file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"the folder of {name!r} does not exist; give a file in one that does")
    values = [{"role": message.role, "content": message.text} for message in messages]
    try:
        write_atomically(path, json.dumps({"messages": values}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{name!r} cannot be written ({error.strerror}); give another file") from None
    show(f"{len(messages)} messages are in {path}")


def make_answer(program: Program, corpus: Corpus) -> Callable[[Params, Watch], list[tuple[str, str]]]:
    """A function (params, watch) -> [(what the user said, the answer)], which is compiled once for a whole run.

    The conversation is the first held-out one, or the first where none is held out, up to its first answer.
    """
    tokenizer, ids = corpus.tokenizer, corpus.held_out_ids
    prompt = given_part(corpus.store, int(ids[0]) if len(ids) else 0)
    form = make_format(conversation_keys(program.config.task.name, program.config.tasks).format, tokenizer)
    config = program.config.generate
    write = make_generator(
        program.model, config, eos_id=form.end, banned_ids=[i for i in no_text(tokenizer) if i != form.end]
    )

    def sample(params: Params, watch: Watch) -> list[tuple[str, str]]:
        new = [token[0] for token in watch(write(params, [prompt])) if token[0] is not None]
        return [(tokenizer.decode(prompt), until_stop(tokenizer.decode(new, continues=True), config.stop))]

    return sample
