"""Questions that a language model answers by likelihood: multiple choice, and texts whose end is to be predicted.

A question is a line of JSON in one of three forms:

  {"query": "...", "choices": ["...", "..."], "gold": 0}                  which text goes on best (ARC, PIQA, COPA)
  {"context_options": ["...", "..."], "continuation": "...", "gold": 0}   after which text it goes on best (WinoGrande)
  {"query": "...", "continuation": "..."}                                 the end that is to be predicted (LAMBADA)

The model reads the query and a prefix of the answer (evaluate.answer_prefix). The log-likelihoods of the tokens that
follow are summed. The answer is the choice with the largest sum, or the largest sum per token or per byte, as longer
texts are less likely (Brown et al. 2020; Gao 2021, "Multiple Choice Normalization in LM Evaluation").
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.evaluate.scoring import Piece, Sums
from llmjax.scores.bootstrap import mean_interval
from llmjax.scores.score import Score

CHOICE_SCORES = (
    Score("accuracy", "accuracy", "", True, 4),
    Score("accuracy_per_token", "accuracy per token", "", True, 4),
    Score("accuracy_per_byte", "accuracy per byte", "", True, 4),
)
CLOZE_SCORES = (
    Score("exact", "predicted exactly", "", True, 4),
    Score("nats_per_token", "loss", "nats per token", False, 4),
)
FORMS = (
    'has no form that is known; write {"query": ..., "choices": [...], "gold": 0}, {"context_options": [...], '
    '"continuation": ..., "gold": 0} or {"query": ..., "continuation": ...}'
)


@dataclasses.dataclass(frozen=True)
class Question:
    """The possible answers to a question, each as a context and the text after it.

    gold  the index of the right one; None for a text whose end is to be predicted, which has one answer
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int | None


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model makes of the questions of a file.

    scores  name -> float64 [questions], for each question the value whose mean is the score
    items   for each question its likelihoods and choices, as JSON can hold them
    """

    scores: dict[str, np.ndarray]
    items: list[dict[str, Any]]


def read_questions(path: pathlib.Path) -> list[Question]:
    """The questions of a file of JSON lines, which may be compressed by gzip (.gz).

    All questions of a file have right answers, or none has. Raises UserError, which names file and line.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            lines = file.read().splitlines()
    except (OSError, EOFError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"--questions={path} {reason}; give a file of JSON lines") from None
    found = [_read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"--questions={path} has no question; write one as JSON in each line")
    if len({question.gold is None for question in found}) > 1:
        raise UserError(
            f"--questions={path} has questions with choices and others without; put them into files of their own"
        )
    return found


def _read(line: bytes, where: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); correct it") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} {FORMS}")
    contexts: list[Any]
    continuations: list[Any]
    query = record.get("query", record.get("context", ""))
    options, choices = record.get("context_options"), record.get("choices")
    if options is not None:
        contexts, continuations = options, [record.get("continuation")] * len(_as_list(options, where))
    elif choices is not None:
        contexts, continuations = [query] * len(_as_list(choices, where)), choices
    else:
        contexts, continuations = [query], [record.get("continuation")]
    texts = [*contexts, *continuations]
    if not all(isinstance(text, str) for text in texts) or not all(text.strip() for text in continuations):
        raise UserError(f"{where} {FORMS}")
    is_choice = options is not None or choices is not None
    gold = record.get("gold") if is_choice else None
    if is_choice and not (type(gold) is int and 0 <= gold < len(contexts) and len(contexts) > 1):
        raise UserError(
            f"{where} has gold={gold!r} for {len(contexts)} choices; give the number of the right one, counted from 0, "
            "of two or more"
        )
    return Question(tuple(contexts), tuple(continuations), gold)


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where} {FORMS}")
    return value


@dataclasses.dataclass
class Reader:
    """Makes pieces for the model of questions, one for each possible answer.

    answer_prefix  what stands between a context and the text after it, unless the context is empty
    read_bos       whether texts begin with the bos token; a text without a context does so in any case
    limit          the most tokens that the model reads at once; a longer context loses its beginning
    shortened      how many answers have lost a part of their context so far
    """

    tokenizer: Tokenizer
    answer_prefix: str
    read_bos: bool
    limit: int
    shortened: int = 0

    def pieces(self, questions: Sequence[Question]) -> Iterator[Piece]:
        """The pieces of all answers in order; the label of an answer is its number among all answers."""
        number = 0
        for question in questions:
            for context, continuation in zip(question.contexts, question.continuations, strict=True):
                yield self._piece(context, continuation, number)
                number += 1

    def _piece(self, context: str, continuation: str, number: int) -> Piece:
        answer_prefix = self.answer_prefix if context else ""
        ids = self.tokenizer.encode(context)
        bos = [self.tokenizer.bos_id] if self.read_bos or not ids else []
        read = np.array(bos + ids)
        whole = np.array(bos + self.tokenizer.encode(context + answer_prefix + continuation))
        # Tokens that reach from the context into what follows are part of the answer.
        shortest = min(len(read), len(whole) - 1)
        differ = np.flatnonzero(read[:shortest] != whole[:shortest])
        start = int(differ[0]) if len(differ) else shortest
        start = max(start, 1)
        if len(whole) - start > self.limit:
            raise UserError(
                f"the answer {continuation[:40]!r}... has {len(whole) - start:,} tokens, more than the "
                f"data.seq_len={self.limit:,} that the model was trained on; leave it out"
            )
        if (excess := len(whole) - 1 - self.limit) > 0:
            self.shortened += 1
            whole, start = whole[excess:], start - excess
        labels = np.full(len(whole) - 1, -1, np.int32)
        labels[start - 1 :] = number
        return Piece(whole, labels)


def summarize(questions: Sequence[Question], sums: Sums) -> Answers:
    """The answers of a model from the sums over the tokens of each possible answer.

    Raises UserError for a likelihood that is not a finite number.
    """
    if not np.isfinite(sums.loss).all():
        raise UserError("a likelihood is not a finite number; use another checkpoint")
    scores: dict[str, list[float]] = {}
    items, at = [], 0
    for question in questions:
        own = slice(at, at + len(question.contexts))
        at = own.stop
        loss, count = sums.loss[own], sums.count[own]
        values, item = (_choose if question.gold is not None else _predict)(
            question, loss, count, sums.correct[own]
        )
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
        items.append(item)
    return Answers({name: np.array(values) for name, values in scores.items()}, items)


def _choose(
    question: Question, loss: np.ndarray, count: np.ndarray, correct: np.ndarray
) -> tuple[dict[str, float], dict[str, Any]]:
    sizes = np.array([len(text.encode()) for text in question.continuations])
    # The first one counts of answers that are equally likely.
    chosen = {
        "accuracy": int(np.argmax(-loss)),
        "accuracy_per_token": int(np.argmax(-loss / count)),
        "accuracy_per_byte": int(np.argmax(-loss / sizes)),
    }
    values = {name: float(index == question.gold) for name, index in chosen.items()}
    return values, {
        "gold": question.gold,
        "chosen": chosen["accuracy"],
        "chosen_per_token": chosen["accuracy_per_token"],
        "chosen_per_byte": chosen["accuracy_per_byte"],
        "log_likelihoods": (-loss).tolist(),
        "tokens": count.astype(int).tolist(),
    }


def _predict(
    question: Question, loss: np.ndarray, count: np.ndarray, correct: np.ndarray
) -> tuple[dict[str, float], dict[str, Any]]:
    exact = bool(correct[0] == count[0])
    values = {"exact": float(exact), "nats_per_token": float(loss[0] / count[0])}
    return values, {"exact": exact, "log_likelihoods": (-loss).tolist(), "tokens": count.astype(int).tolist()}


def describe(answers: Answers) -> dict[str, str]:
    """Label -> mean and interval of each score, as text."""
    rows = {}
    for score in (*CHOICE_SCORES, *CLOZE_SCORES):
        if score.name in answers.scores:
            mean, low, high = mean_interval(answers.scores[score.name])
            rows[score.label] = f"{score.describe(mean)}  ({low:.{score.digits}f} to {high:.{score.digits}f})"
    return rows


def as_json(answers: Answers) -> dict[str, Any]:
    """Scores with their intervals, and all items."""
    scores = {}
    for name, values in answers.scores.items():
        mean, low, high = mean_interval(values)
        scores[name] = {"mean": mean, "low": low, "high": high}
    return {"questions": len(answers.items), "scores": scores, "items": answers.items}


def name_of(path: str | os.PathLike[str]) -> str:
    """The name of a file of questions without its endings."""
    return pathlib.Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
