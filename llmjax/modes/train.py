"""`--mode=train`: trains from wherever the workdir stands, then probes, summarizes and writes the report.

A workdir holds

    config.json       the resolved config            documents.json  the documents of the run
    metrics.jsonl     a line for each update         checkpoints/    the newest, and the best
    tensorboard/      the same for TensorBoard       saved.json      which checkpoint was written last
    samples.jsonl     texts sampled by the run       tokenizer/      the tokenizer of the run
    scores.json       what its scores are            probes.json     where evaluate.probes asks for them
    summary.json      results and commands           documents/      texts behind spikes and dropped micro-steps
    report.html       all of it as one page          partial_update/ an update stopped between its micro-steps
    profile/          traces that --profile asked for
    classes.json      for classification: the confusion matrix of the newest evaluation
    wandb.json        the id of its W&B run, and wandb/ with the files of W&B, where metrics.wandb asks for it
    frozen/           the parameters that do not train, where lora.rank or train.frozen leave some out
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import jax

from llmjax.build.compile_ahead import CompileAhead
from llmjax.build.corpus import Corpus
from llmjax.build.corpus_record import (
    save_tokenizer,
    write_record,
)
from llmjax.build.program import Program, make_program
from llmjax.build.restore import (
    hold,
    open_checkpoints,
    resume_or_init,
)
from llmjax.build.tuning.adapters import check_tuning
from llmjax.config.schema import Config
from llmjax.errors import UserError, choose
from llmjax.escapes import complain
from llmjax.files import write_atomically
from llmjax.modes.evaluate import describe_compression, describe_details
from llmjax.modes.parts.corpus import read_corpus
from llmjax.modes.parts.learned import show_learned
from llmjax.modes.parts.loop_parts import make_run
from llmjax.modes.parts.probe import make_probes, probe
from llmjax.modes.request import Request
from llmjax.modes.samples.table import SAMPLES
from llmjax.parallel import hosts
from llmjax.parallel.agreement import on_primary, together
from llmjax.plan.advice import remarks
from llmjax.plan.memory import check_state_fits
from llmjax.plan.summary import describe
from llmjax.quantities import format_duration
from llmjax.report.report import write_report
from llmjax.scores import confusion
from llmjax.scores.score import FILE, Score, describe_scores, scores_as_json
from llmjax.tasks.contract import HasDetails
from llmjax.tasks.table import TASKS
from llmjax.terminal.lines import format_table, indent, say, warn
from llmjax.terminal.stages import working
from llmjax.train.loop.loop import train
from llmjax.train.loop.profiler import Profiler
from llmjax.train.loop.run import Result
from llmjax.train.loop.run_position import Position
from llmjax.train.loop.stop_request import OUTPUT_CLOSED, Stopped, StopRequest
from llmjax.train.loop.upkeep import FollowUpFailed, TrainingFailed, describe_failure
from llmjax.workdir import standing
from llmjax.workdir.contents import commands, saved_config, write_json
from llmjax.workdir.recorder import Recorder
from llmjax.workdir.samples import read_samples
from llmjax.workdir.sinks.table import check_sinks


def run(request: Request) -> int:
    """Trains from wherever the workdir stands to train.num_updates, and writes its report; the exit code."""
    with hold(request.workdir) as check_lock:
        together(lambda: standing.check_standing(request.workdir, warn))
        on_primary(lambda: standing.forget_unnamed_save(request.workdir))
        with StopRequest(at_once=True) as stop:
            try:
                return train_until(stop, request, check_lock)
            # Before or after training. The loop itself stops in its own way, which saves.
            except Stopped:
                say("\nstopped; the same command goes on from there")
                return stop.exit_code


def train_until(stop: StopRequest, request: Request, check_lock: Callable[[], None]) -> int:
    """Trains until the end, or until `stop` asks for it; returns the exit code.

    `check_lock` raises where another run has taken the workdir. Raises Stopped where a wish to stop comes before or
    after training, when there is nothing to save.
    """
    config, workdir = request.config, request.workdir
    check_profile(request.profile, config)
    on_primary(lambda: check_sinks(config.metrics))
    check_tuning(config, request.derived, request.devices, workdir)
    corpus = read_corpus(config, request.derived, workdir)
    asked = make_probes(corpus, config)
    # A stopped update has sums in its state, even if updates now have one micro-step and need none.
    under_way = bool(standing.partial_folders(workdir))
    so_far = saved_config(workdir)
    program = make_program(
        config,
        request.derived,
        corpus.tokenizer.vocab_size,
        accumulates=under_way,
        vocabulary=corpus.vocabulary,
    )
    check_state_fits(program)
    with (
        _compile_ahead(program, is_new=so_far is None) as ahead,
        open_checkpoints(workdir, standing.CHECKPOINTS, config.checkpoint, check_lock) as checkpoints,
    ):
        with working("preparing the parameters"):
            state, position = resume_or_init(program, corpus, checkpoints, workdir)
        finished = position.is_over(program.steering.num_tokens, config.train.patience)
        check_profile(request.profile, config, position)
        if not finished:
            ahead.start(position.tokens)
        if hosts.is_primary():
            write_beginning(program, corpus, workdir, position, finished)
        plan = describe(corpus, program, workdir, position.update)
        say(f"plan\n{format_table(plan)}\n")
        say_beginning(program, corpus, so_far, position, finished, request.started)
        # Where a sink cannot be had on the first process, none may go on to wait for it.
        recorder = together(lambda: open_recorder(program, workdir, position, stop))
        run = make_run(program, corpus, workdir, checkpoints, stop, check_lock, recorder.samples, ahead.wait)
        if request.profile:
            profiler = Profiler(request.profile, profile_folder(workdir), recorder.say)
            run = dataclasses.replace(run, profiler=profiler)
        try:
            with recorder:
                result = train(run, state, position, recorder, checkpoints, stop)
                recorder.summarize(summary_numbers(result))
        except (TrainingFailed, FollowUpFailed) as error:
            if hosts.is_primary():
                leave_failed(workdir, error)
            return 1
    if hosts.is_primary() and result.position.partial_update is None:
        standing.remove_partial_update(workdir)
    what = "probing"
    try:
        if not result.stopped:
            params = program.eval_params(result.state)
            probe(program, asked, params, result.position.update, workdir, stop.watch)
        what = "writing its summary and report"
        if hosts.is_primary():
            finish(corpus, workdir, config, program.task.scores, result, plan, trained=not finished)
    except BrokenPipeError:
        raise
    except Exception as error:
        saved = f"training up to update {result.position.update} is saved in {workdir / 'checkpoints'}"
        complain(describe_failure(saved, what, error))
        return 1
    return stop.exit_code if result.stopped else 0


def leave_failed(workdir: pathlib.Path, error: TrainingFailed | FollowUpFailed) -> None:
    """Tells the error of a run, and writes its report."""
    complain(str(error))
    # A training that failed goes back to a checkpoint from before the stopped update.
    if isinstance(error, TrainingFailed):
        standing.remove_partial_update(workdir)
    write_report(workdir)


def say_beginning(
    program: Program,
    corpus: Corpus,
    so_far: dict | None,
    position: Position,
    finished: bool,
    started: float,
) -> None:
    """Says what a user should know of the run before its first update, and that it begins, or that it is finished."""
    if finished:
        done, asked = f"{position.update:,} updates are done", program.config.train
        why = f"train.num_updates={asked.num_updates} asks for no more"
        if position.tokens < program.steering.num_tokens:
            why = (
                f"no score was better in the last {position.waited} of train.patience={asked.patience}; set it to "
                f"{2 * asked.patience} to go on"
            )
        say(f"finished: {done}, and {why}")
        return
    if not position.update:
        show_learned(program, corpus)
    for remark in remarks(program, so_far, position.tokens):
        say(f"note: {remark}\n")
    say(f"ready after {format_duration(time.perf_counter() - started)}; the first update compiles")


def _compile_ahead(program: Program, is_new: bool) -> CompileAhead:
    """Starts to compile the step of a new run. One that goes on may be finished: there the position decides."""
    ahead = CompileAhead(program)
    if is_new:
        ahead.start(0)
    return ahead


def open_recorder(program: Program, workdir: pathlib.Path, position: Position, stop: StopRequest) -> Recorder:
    """The recorder of a run that goes on from `position`. It asks to stop where nobody reads the output any more."""
    return Recorder(
        workdir,
        resume_update=position.update,
        num_tokens=program.steering.num_tokens,
        scores=program.task.scores,
        tokens_per_update=program.steering.tokens_per_update,
        on_closed=lambda: stop.ask(OUTPUT_CLOSED),
        metrics=program.config.metrics,
        config=program.config.to_dict(),
    )


def summary_numbers(result: Result) -> dict[str, float]:
    """What a run has come to, as numbers: how far it went, and its last scores on held-out text."""
    position = result.position
    ran = {"updates": position.update, "tokens": position.tokens, "seconds": position.seconds}
    return ran | {f"held_out/{name}": value for name, value in (position.evaluation or {}).items()}


def check_profile(window: range, config: Config, position: Position | None = None) -> None:
    """UserError where the run, which stands at `position`, will not make all updates of `window`."""
    if not window:
        return
    given, last = f"--profile={window.start}:{window.stop}", window[-1]
    # With batches that change, the number of updates is not known before the end.
    fixed = config.train.batch_schedule == "constant" and config.controller.name == "none"
    if fixed and last > config.train.num_updates:
        raise UserError(
            f"{given} asks for update {last}, and train.num_updates={config.train.num_updates}; name updates of the run"
        )
    if position is None:
        return
    # An update that was stopped between its micro-steps would not be whole.
    done = position.update + (position.partial_update is not None)
    if window.start <= done:
        raise UserError(
            f"{given} begins with update {window.start}, and the run goes on after update {done}; begin with "
            f"{done + 1} or a later one"
        )


def profile_folder(workdir: pathlib.Path) -> pathlib.Path:
    """Where this process writes its profile: jax cannot read what several processes wrote into one folder."""
    folder = workdir / "profile"
    return folder if jax.process_count() == 1 else folder / f"process-{jax.process_index()}"


def write_beginning(
    program: Program, corpus: Corpus, workdir: pathlib.Path, position: Position, finished: bool
) -> None:
    """Writes the files that later commands need of a run: its config, tokenizer, documents and scores."""
    standing.check_metrics(workdir, position.update, warn)
    lasting = as_long_as_before(program.config, workdir) if finished else program.config
    write_json(workdir / "config.json", lasting.to_dict())
    save_tokenizer(workdir, corpus.tokenizer)
    write_record(workdir, corpus)
    write_atomically(workdir / FILE, scores_as_json(program.task.scores))


def as_long_as_before(config: Config, workdir: pathlib.Path) -> Config:
    """`config`, with the larger train.num_updates of the run in `workdir` if that asks for more.

    The saved config of a finished run never asks for fewer updates than were done.
    """
    saved = saved_config(workdir)
    if saved is None or saved["train"]["num_updates"] <= config.train.num_updates:
        return config
    train = dataclasses.replace(config.train, num_updates=saved["train"]["num_updates"])
    return dataclasses.replace(config, train=train)


def finish(
    corpus: Corpus,
    workdir: pathlib.Path,
    config: Config,
    scores: Sequence[Score],
    result: Result,
    plan: dict[str, str],
    trained: bool = True,
) -> None:
    """The closing words, and the files that repeat them: summary.json and report.html."""
    results, task = {}, TASKS[config.task.name]
    if result.position.evaluation is not None:
        results = describe_scores(scores, result.position.evaluation) | describe_compression(task, corpus)
    samples, _ = read_samples(workdir)
    opening = "import "
    told = choose(SAMPLES, "task.use", task.use)
    if samples and config.data.sources != ("stdlib",):
        opening = samples[-1].prompt.strip().split("\n")[0][: told.opening]
    done = math.ceil(result.position.tokens / (config.train.tokens_per_update or 1))
    patience = config.train.patience if result.position.has_waited(config.train.patience) else 0
    following = commands(workdir, max(config.train.num_updates, done), opening, told.mode, patience)
    if patience and result.position.best_rank is not None:
        best = scores[0].describe(scores[0].rank(result.position.best_rank))
        results[f"best {scores[0].label}"] = f"{best}, before the run waited in vain"
    write_json(
        workdir / "summary.json",
        {"title": f"llmjax {workdir.name}", "plan": plan, "results": results, "commands": following},
    )
    with working("writing the report"):
        report = write_report(workdir)
    if result.stopped:
        partial = result.position.partial_update
        where = f"after update {result.position.update}"
        if partial is not None:
            where += f" and {len(partial.metrics)} of {partial.steps} micro-steps of the next"
        say(f"\nstopped {where} and saved; go on with\n  {following['resume']}")
        return
    if samples:
        say(f"\nsample: {told.before}\n{indent(samples[-1].prompt)}\n{told.did}\n{indent(samples[-1].text)}")
    rows = format_table(results | {"report": str(report)})
    if (workdir / confusion.FILE).exists() and isinstance(task, HasDetails):
        rows += "\n" + describe_details(json.loads((workdir / confusion.FILE).read_text(encoding="utf-8")))
    seconds = format_duration(result.position.seconds)
    say(f"\ndone after {seconds}\n{rows}" if trained else f"\nfinished before; that took {seconds}\n{rows}")
    say(f"\nnext\n{format_table(following)}")
