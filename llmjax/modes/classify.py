"""`--mode=classify`: gives each text a label, with the probability of every label."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from llmjax.build.corpus import Corpus
from llmjax.build.model import make_setting
from llmjax.build.program import Program
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.escapes import escape_breaks, show
from llmjax.evaluate.scoring import Piece, pack
from llmjax.modes.generate import Loaded, load, mode_for
from llmjax.modes.parts.interactive import piped_lines
from llmjax.modes.request import Request
from llmjax.parallel import hosts
from llmjax.tasks.classification import make_probabilities
from llmjax.terminal.lines import warn
from llmjax.terminal.stages import on_terminal
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Params

# Lines of a pipe that are labelled together. A choice: many short texts share a row.
GROUP = 256
# Held-out texts that the samples of a run label. A choice.
SAMPLES = 3
# The most characters of a text that a sample shows. A choice.
LONGEST_SAMPLE = 300


class Answer(NamedTuple):
    """The label of a text, and the probability of every label, the most probable first."""

    label: str
    probabilities: dict[str, float]


def run(request: Request) -> int:
    """Labels the prompts, or the lines of standard input if there are none, and returns exit code 0."""
    classifier = TextClassifier(load(request, on_terminal))
    if request.prompts:
        groups: Iterable[Sequence[str]] = [request.prompts]
    elif jax.process_count() > 1:
        raise UserError("several processes cannot share the lines of standard input; use --prompt_file")
    else:
        # A line that is typed is answered at once.
        size = 1 if sys.stdin.isatty() else GROUP
        groups = _groups(piped_lines(), size)
    write = describe_json if request.jsonl else describe_text
    for texts in groups:
        for text, answer in zip(texts, classifier.classify(texts), strict=True):
            if hosts.is_primary():
                show(write(text, answer))
    return 0


def _groups(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    while group := list(itertools.islice(lines, size)):
        yield group


def describe_json(text: str, answer: Answer) -> str:
    """A line of JSON with the text, its label and the probabilities."""
    probabilities = {label: round(value, 6) for label, value in answer.probabilities.items()}
    values = {"text": text, "label": answer.label, "probabilities": probabilities}
    return json.dumps(values, ensure_ascii=False)


def describe_text(text: str, answer: Answer) -> str:
    """A line with the label, its probability and the text, between tabs."""
    return f"{answer.label}\t{answer.probabilities[answer.label]:.4f}\t{escape_breaks(text, tabs=True)}"


class TextClassifier:
    """Labels texts with a loaded checkpoint. Raises UserError if its task gives no labels."""

    def __init__(self, loaded: Loaded):
        program = loaded.program
        if program.task.use != "classify":
            raise UserError(
                f"task.name={program.config.task.name!r} gives no labels; use {mode_for(program)}, or train a model "
                "with task.name=classification"
            )
        self._loaded = loaded
        self._probabilities = make_text_probabilities(program, loaded.tokenizer, self._remark)
        self._labels = program.config.tasks[program.config.task.name].labels

    def classify(self, texts: Sequence[str]) -> list[Answer]:
        """The label of each text. Raises UserError for a text without any character but white space."""
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise UserError(f"text {number}, {text!r}, is empty; give some text, or leave it out")
        return [as_answer(self._labels, row) for row in self._probabilities(self._loaded.params, texts)]

    def _remark(self, count: int, longest: int) -> None:
        """Says, once, that texts are cut."""
        if "cut" in self._loaded.told:
            return
        self._loaded.told.add("cut")
        limit = self._loaded.program.config.data.seq_len
        warn(
            f"note: {count:,} text{'s'[: count != 1]} of up to {longest:,} tokens {'is' if count == 1 else 'are'} cut "
            f"at the end to the data.seq_len={limit:,} tokens that the model was trained on"
        )


def as_answer(labels: Sequence[str], probabilities_C: np.ndarray) -> Answer:
    """The answer for one text. Of labels that are equally probable the first one counts."""
    order = np.argsort(-probabilities_C, kind="stable").tolist()
    return Answer(labels[order[0]], {labels[i]: float(probabilities_C[i]) for i in order})


def make_text_probabilities(
    program: Program, tokenizer: Tokenizer, on_cut: Callable[[int, int], None] = lambda count, longest: None
) -> Callable[[Params, Sequence[str]], np.ndarray]:
    """A function (params, texts) -> float32 [texts, C], which packs many texts into a row and is compiled once.

    on_cut  called with the number of texts that are too long and are cut at the end, and the tokens of the longest
    """
    config, T = program.config, program.batch.seq_len
    setting = make_setting(config, program.layout, training=False)
    probabilities = make_probabilities(program.model, setting)
    # The results are complete on every process.
    compiled = jax.jit(probabilities, out_shardings=program.layout.sharding(None, None, None))

    def of_texts(params: Params, texts: Sequence[str]) -> np.ndarray:
        encoded = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        long = [len(tokens) - 1 for tokens in encoded if len(tokens) > T + 1]
        if long:
            on_cut(len(long), max(long))
        found = np.zeros((len(texts), len(setting.keys.labels)), np.float32)
        for arrays, numbers_BT in pack(_pieces(encoded, T), lambda length: program.probe_shape(1)):
            values = np.asarray(compiled(params, program.placement.place(arrays)))
            found[numbers_BT[numbers_BT >= 0]] = values[numbers_BT >= 0]
        return found

    return of_texts


def _pieces(encoded: Sequence[Sequence[int]], seq_len: int) -> Iterator[Piece]:
    """Each text as a piece, whose last position has the number of the text as its label."""
    for number, tokens in enumerate(encoded):
        part = np.array(tokens[: seq_len + 1])
        numbers = np.full(len(part) - 1, -1, np.int32)
        numbers[-1] = number
        yield Piece(part, numbers)


def make_labeller(program: Program, corpus: Corpus) -> Callable[[Params, Watch], list[tuple[str, str]]]:
    """A function (params, watch) -> [(text, its label as the model sees it)], which is compiled once for a whole run.

    The texts are the first held-out ones; there are none where nothing is held out. `watch` is that of samples that go
    on token by token, and is not used.
    """
    store, labels = corpus.store, program.config.tasks[program.config.task.name].labels
    classes = store.labels
    # Every store of the task has labels.
    assert classes is not None
    docs = [int(doc) for doc in corpus.held_out_ids[:SAMPLES]]
    special = {corpus.tokenizer.bos_id, corpus.tokenizer.eos_id}
    texts = [
        corpus.tokenizer.decode([token for token in store.tokens(doc).tolist() if token not in special])
        for doc in docs
    ]
    probabilities = make_text_probabilities(program, corpus.tokenizer)

    def sample(params: Params, watch: Watch) -> list[tuple[str, str]]:
        if not docs:
            return []
        answers = [as_answer(labels, row) for row in probabilities(params, texts)]
        shown = [text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]}…" for text in texts]
        return [
            (
                text,
                f"{answer.label} ({answer.probabilities[answer.label]:.3f}), labelled {labels[classes[doc]]}",
            )
            for text, answer, doc in zip(shown, answers, docs)
        ]

    return sample
