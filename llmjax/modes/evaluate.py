"""`--mode=evaluate`: measures a checkpoint on the held-out part of the corpus, beside compressors on the same text."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llmjax.build.corpus import Corpus
from llmjax.build.corpus_record import (
    describe_difference,
    mend_tokenizer,
    trained_on,
)
from llmjax.build.program import Program, make_program
from llmjax.build.restore import (
    load_params,
    untrained_params,
)
from llmjax.convert.foreign import is_foreign
from llmjax.errors import UserError
from llmjax.evaluate.held_out import compressed_bits_per_byte, evaluate
from llmjax.modes.parts import answers
from llmjax.modes.parts.corpus import read_corpus
from llmjax.modes.parts.probe import make_probes, probe
from llmjax.modes.request import Request
from llmjax.parallel import hosts
from llmjax.report.report import write_report
from llmjax.scores import confusion
from llmjax.scores.score import describe_scores
from llmjax.tasks.contract import HasDetails, Task
from llmjax.terminal.lines import format_columns, format_table, say
from llmjax.terminal.stages import StageProgress, working
from llmjax.train.checkpoint.which import AVERAGE
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Batch, Params
from llmjax.workdir import standing
from llmjax.workdir.contents import saved_config

# The most bytes of held-out text that are compressed with gzip and xz. A choice: it takes a few seconds.
COMPRESSED = 8 * 2**20


def run(request: Request) -> int:
    """Prints the held-out scores of a checkpoint, runs the probes that the config asks for, and returns exit code 0.

    If the workdir holds no run yet, the checkpoint is the one that checkpoint.init_from names. Raises `UserError` if
    the config holds nothing out, or if the checkpoint does not exist.
    """
    if request.questions:
        return answers.run(request)
    config, derived = request.config, request.derived
    workdir, checkpoint = request.workdir, request.checkpoint
    untrained = saved_config(workdir) is None and not standing.has_begun(workdir)
    if untrained and checkpoint != "latest":
        raise UserError(
            f"--checkpoint={checkpoint} is of a run, and --workdir={workdir} holds none; "
            "name the checkpoint of checkpoint.init_from by --config.checkpoint.init_checkpoint"
        )
    corpus = read_corpus(config, derived, workdir)
    if corpus.held_out is None:
        raise UserError("data.held_out_fraction=0 leaves nothing to evaluate on; train with a part held out")
    asked = make_probes(corpus, config)
    if asked and AVERAGE.fullmatch(checkpoint):
        raise UserError(
            f"evaluate.probes={config.evaluate.probes} are recorded with one checkpoint, and --checkpoint={checkpoint} "
            "is an average of several; set evaluate.probes to (), or name one checkpoint"
        )
    program = make_program(config, derived, corpus.tokenizer.vocab_size, vocabulary=corpus.vocabulary)
    with working("reading the checkpoint"):
        if untrained:
            workdir = pathlib.Path(config.checkpoint.init_from)
            update, params = untrained_params(program, _refuse_new)
        else:
            update, params = load_params(program, workdir, checkpoint)
    # A model of another program does not say what it was trained on.
    if not (untrained and is_foreign(workdir)):
        if different := describe_difference(workdir, trained_on(workdir, update), corpus):
            say(f"{different}; what follows is of those here\n")
        if hosts.is_primary():
            mend_tokenizer(workdir, corpus, different)
    details: list[dict[str, Any]] = []
    results = score_held_out(program, corpus, params, on_details=details.append)
    rows = {
        "checkpoint": f"{f'{checkpoint}, to ' if AVERAGE.fullmatch(checkpoint) else ''}update {update} of {workdir}",
        "held out": _describe_held_out(corpus),
    }
    say(
        format_table(
            rows | describe_scores(program.task.scores, results) | describe_compression(program.task, corpus)
        )
    )
    for each in details:
        say(describe_details(each))
    if asked:
        probe(program, asked, params, update, workdir)
        if hosts.is_primary():
            say(format_table({"report": str(write_report(workdir))}))
    return 0


def _describe_held_out(corpus: Corpus) -> str:
    """How much is held out, in documents, bytes of their texts and tokens."""
    plan, count = corpus.held_out_plan, corpus.held_out_plan.num_documents
    # A task with weights has tokens that are read and not predicted, such as the question before an answer.
    all_of_them = ", also those that are only read" if "weights" in corpus.train.columns else ""
    documents = f"{count:,} document{'s'[: count != 1]}"
    return f"{documents}, {corpus.held_out_bytes:,} bytes, {plan.num_tokens:,} tokens{all_of_them}"


def score_held_out(
    program: Program,
    corpus: Corpus,
    params: Params,
    watch: Watch = iter,
    on_details: Callable[[dict[str, Any]], None] = lambda details: None,
) -> dict[str, float]:
    """The scores of the task over all held-out targets, {name: value}.

    watch       passes on the batches that it is given, and may stop in between
    on_details  called with what a task has to say besides its scores, if there is anything
    """
    # The callers have found out that there is a held-out part.
    assert corpus.held_out is not None
    size = program.config.evaluate.batch_size or program.batch.micro_batch_size
    rows = corpus.held_out_plan.num_rows
    with (
        StageProgress(amount="{:,}".format) as progress,
        program.placement.batches(corpus.held_out, stop=rows, batch_size=size) as feed,
    ):
        batches = _counted(feed, lambda count: progress("evaluating", min(count * size, rows), rows))
        totals = evaluate(program.eval_step, params, watch(batches), corpus.held_out_bytes)
    task = program.task
    if isinstance(task, HasDetails):
        on_details(task.details(totals, program.config.tasks[program.config.task.name]))
    return task.evaluate(totals)


def _refuse_new(sentence: str) -> None:
    """Raises UserError if there is no run, and the model of checkpoint.init_from has not all parameters of the task."""
    raise UserError(f"{sentence}; train first, and then evaluate the run")


def describe_details(details: Mapping[str, Any]) -> str:
    """What a task says besides its scores, for the terminal: tables of its classes and of what they were taken for."""
    labels, matrix = details["labels"], np.asarray(details["confusion"])
    text = f"\nby class\n{format_columns(*confusion.table_rows(labels, matrix))}"
    if len(labels) <= confusion.PRINTED:
        text += "\n\ntexts of each class, by what they were taken for\n"
        text += format_columns(*confusion.confusion_rows(labels, matrix))
    return text


def _counted(batches: Iterable[Batch], report: Callable[[int], None]) -> Iterator[Batch]:
    """Passes `batches` on, and reports before each of them how many have been passed on."""
    for count, batch in enumerate(batches):
        report(count)
        yield batch


def describe_compression(task: Task, corpus: Corpus) -> dict[str, str]:
    """How well gzip and xz compress the held-out text, {name: sentence}. Empty for a task that models no text."""
    if not task.compresses_text:
        return {}
    with working("compressing held-out text"):
        text = corpus.held_out_text(COMPRESSED)
        rivals = compressed_bits_per_byte(text)
    part = "" if len(text) >= corpus.held_out_bytes else f", on the first {len(text):,} bytes"
    return {name: f"{bits:.3f} bits per byte of the same text{part}" for name, bits in rivals.items()}
