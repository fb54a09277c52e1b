"""`--mode=evaluate --questions=FILE`: answers by likelihood, with a loaded checkpoint, beside those of another run."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.evaluate import questions
from llmjax.evaluate.questions import Answers, Question, Reader
from llmjax.evaluate.scoring import score_pieces
from llmjax.models.table import FAMILIES
from llmjax.modes.generate import Loaded, load
from llmjax.modes.request import Request
from llmjax.parallel import hosts
from llmjax.scores.bootstrap import mean_interval
from llmjax.terminal.lines import format_table, say, warn
from llmjax.terminal.stages import working
from llmjax.workdir.contents import write_json

# The folder in a workdir for the answers, a file for each file of questions.
FOLDER = "questions"


def run(request: Request) -> int:
    """Answers the questions of all files, prints the scores and writes FOLDER/NAME.json. Returns exit code 0."""
    asked = {path: questions.read_questions(path) for path in request.questions}
    names = [questions.name_of(path) for path in asked]
    if len({*names}) < len(names):
        raise UserError("two files of --questions have the same name; evaluate them one after the other")
    against = None if request.against is None else read_answers(request.against, asked)
    loaded = load(request)
    for path, own in asked.items():
        with working(f"answering {path}"):
            answers = answer(loaded, own)
        rows = {"questions": f"{len(own):,} of {path}", **questions.describe(answers)}
        if against is not None:
            rows |= describe_difference(answers, against)
        if hosts.is_primary():
            file = request.workdir / FOLDER / f"{questions.name_of(path)}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = {
                "file": str(path),
                "update": loaded.update,
                "answer_prefix": loaded.program.config.evaluate.answer_prefix,
            }
            write_json(file, {**facts, **questions.as_json(answers)})
            rows["written to"] = str(file)
        say(format_table(rows))
    return 0


def answer(loaded: Loaded, asked: Sequence[Question]) -> Answers:
    """What the model answers. Raises UserError for a model that does not predict the next token of a text."""
    program = loaded.program
    name, config = program.config.task.name, program.config
    one_text = program.task.use in ("generate", "chat") and not FAMILIES[config.model.family].reads_source
    if FAMILIES[config.model.family].sees_both_sides or not one_text:
        raise UserError(
            f"--questions needs a model that goes on with a text, which model.family={config.model.family!r} with "
            f"task.name={name!r} does not; use one with task.name=language_model or conversation"
        )
    reader = Reader(
        loaded.tokenizer, config.evaluate.answer_prefix, config.evaluate.read_bos, program.batch.seq_len
    )
    losses = lambda params, arrays: program.token_losses(params, program.placement.place(arrays))  # noqa: E731
    count = sum(len(question.contexts) for question in asked)
    sums = score_pieces(losses, loaded.params, reader.pieces(asked), count, lambda n: program.probe_shape(1))
    if reader.shortened:
        warn(
            f"note: {reader.shortened:,} of {count:,} answers follow a context that is longer than the data.seq_len="
            f"{reader.limit:,} tokens that the model was trained on, and whose beginning is left out"
        )
    return questions.summarize(asked, sums)


def read_answers(path: pathlib.Path, asked: dict[pathlib.Path, Any]) -> dict[str, Any]:
    """The answers of another run, which `run` has written. UserError if they are not of the one file of questions."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = len(asked) == 1 and len(found["items"]) == len(next(iter(asked.values())))
        same = same and pathlib.Path(found["file"]).name == next(iter(asked)).name
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--against={path} holds no answers ({error}); give a {FOLDER}/NAME.json of a run"
        ) from None
    if not same:
        raise UserError(
            f"--against={path} has answers to other questions; give one file for --questions, and its answers"
        )
    return found


def describe_difference(answers: Answers, against: dict[str, Any]) -> dict[str, str]:
    """The difference to another run, {label: mean and interval}, compared question by question."""
    theirs = {
        "accuracy": [item["chosen"] == item["gold"] for item in against["items"]],
        "accuracy_per_byte": [item["chosen_per_byte"] == item["gold"] for item in against["items"]],
    } if "accuracy" in answers.scores else {"exact": [item["exact"] for item in against["items"]]}  # fmt: skip
    rows = {}
    for name, values in theirs.items():
        mean, low, high = mean_interval(answers.scores[name] - np.array(values, np.float64))
        verdict = "no difference is shown" if low <= 0 <= high else "better" if mean > 0 else "worse"
        rows[f"{name.replace('_', ' ')}, difference"] = f"{mean:+.4f}  ({low:+.4f} to {high:+.4f}): {verdict}"
    return rows
