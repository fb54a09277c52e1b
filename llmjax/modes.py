"""What each `--mode` does, from a raw config to files and words: the story of a run, told once.

A workdir holds config.json (resolved), metrics.jsonl, tensorboard/, checkpoints/, tokenizer/, samples.md, summary.json
and report.html; probes.json where there were probes, documents/ where text was written out to be looked at, and window/
while a stopped update is open.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

import llmjax
from llmjax import config as configs
from llmjax import standing
from llmjax.build import Corpus, Program, make_corpus, make_program
from llmjax.config import Config
from llmjax.data.tokenizer import KINDS, StreamDecoder, Tokenizer, TokenizerConfig, load_tokenizer
from llmjax.documents import (
    describe_difference,
    mend_tokenizer,
    save_tokenizer,
    trained_on,
    write_record,
)
from llmjax.errors import UserError
from llmjax.escapes import complain, show
from llmjax.evaluate import probes
from llmjax.evaluate.held_out import compressed_bits_per_byte, evaluate
from llmjax.evaluate.not_finite import documents_not_finite
from llmjax.evaluate.scoring import Arrays, Probe, Text
from llmjax.files import write_atomically
from llmjax.flags import MODES
from llmjax.generate.generate import make_generator
from llmjax.initial import check_initial, own_tokenizer, resumes, with_tokenizer
from llmjax.nn.position import POSITIONS
from llmjax.parallel import hosts
from llmjax.parallel.agreement import check_same, together
from llmjax.parallel.devices import peak_flops
from llmjax.parallel.host_memory import has_accelerator, keep_freed_memory
from llmjax.plan.compile import compile_step
from llmjax.plan.memory import check_state_fits
from llmjax.plan.remarks import remarks
from llmjax.plan.summary import describe, describe_program
from llmjax.plan.topology import topology_devices
from llmjax.resume import (
    WINDOW,
    hold,
    initial_params,
    load_params,
    open_checkpoints,
    restore,
    resume_or_init,
)
from llmjax.terminal import StageProgress, format_table, indent, say
from llmjax.train.batch import BatchArithmetic
from llmjax.train.checkpoint import Checkpoints, warn
from llmjax.train.loop import train
from llmjax.train.metrics import Recorder
from llmjax.train.report import write_report
from llmjax.train.run import Result, Run
from llmjax.train.signals import OUTPUT_CLOSED, Stopped, StopRequest
from llmjax.train.state import TrainState
from llmjax.train.upkeep import FollowUpFailed, TrainingFailed, describe_failure
from llmjax.train.which import check_name
from llmjax.types import Batch, Params
from llmjax.workdir import commands, last_sample, saved_config, write_json, write_samples

SAMPLE_PROMPT = 64  # tokens of a held-out document that the samples of a run continue
COMPRESSED = 8 * 2**20  # bytes of held-out text that gzip and xz are tried on
Watch = Callable[[Iterable[Any]], Iterator[Any]]  # the same items one by one; may raise to end it
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


def run(
    mode: str, raw: Mapping[str, Any], workdir: pathlib.Path, *, prompts: Sequence[str], checkpoint: str
) -> int:
    """Runs `mode`; the exit code."""
    started = time.perf_counter()
    check_name("--checkpoint", checkpoint)
    config = configs.read(raw)
    if not has_accelerator():
        keep_freed_memory()
    hosts.initialize()
    abroad = mode == "plan" and config.plan.topology
    devices = topology_devices(config.plan.topology) if abroad else jax.devices()
    config, batch = configs.check(config, len(devices))
    if mode == "plan":
        if not abroad:
            check_initial(config, workdir)
        return run_plan(config, batch, workdir, devices)
    together(lambda: check_workdir(mode, config, workdir))
    seen = {"the config": f"one of digest {standing.digest_of(config.to_dict())}"}
    seen |= standing.describe(workdir, folders=mode == "train")
    check_same(seen, "give every process the same command, and a --workdir on a disk that they share")
    if mode == "train":
        with hold(workdir) as lock:
            together(lambda: standing.check_standing(workdir, warn))
            return run_train(config, batch, workdir, started, lock)
    if mode == "evaluate":
        return run_evaluate(config, batch, workdir, checkpoint)
    if mode == "generate":
        return run_generate(config, batch, workdir, checkpoint, prompts)
    raise UserError(f"--mode={mode} is not known; use one of {', '.join(MODES)}")


def check_workdir(mode: str, config: Config, workdir: pathlib.Path) -> None:
    """UserError where what lies in `workdir` is not what `mode` with this config can go on from."""
    check_initial(config, workdir)
    saved = standing.config_of(workdir, warn)
    if saved is not None:
        configs.check_resume(saved, config, str(workdir))
    elif mode != "train" and not (mode == "evaluate" and config.checkpoint.init_from):
        raise UserError(f"--workdir={workdir} holds no run; train there first, or give another --workdir")


def read_corpus(config: Config, batch: BatchArithmetic, workdir: pathlib.Path) -> Corpus:
    """The corpus, the same for every process; UserError where one cannot read it or reads another."""
    with StageProgress() as progress:
        corpus = together(lambda: make_corpus(with_tokenizer(config, workdir), batch, progress))
    seen = {"the tokenizer": corpus.tokenizer.fingerprint, "the documents": corpus.fingerprint}
    check_same(
        {name: f"one of digest {value[:12]}" for name, value in seen.items()},
        "give every process the same files behind data.sources and tokenizer.path",
    )
    return corpus


def run_plan(config: Config, batch: BatchArithmetic, workdir: pathlib.Path, devices: list[jax.Device]) -> int:
    """Says what the config means and compiles its step; with plan.topology it does without the corpus."""
    if config.plan.topology:
        program = make_program(config, batch, planned_vocab_size(config.tokenizer), devices)
        rows = describe_program(program, attended=(config.data.seq_len + 1) / 2)
    else:
        with StageProgress() as progress:
            corpus = make_corpus(with_tokenizer(config, workdir), batch, progress)
        under_way = standing.has_begun(workdir) and resumes(config, workdir)
        if under_way and (different := describe_difference(workdir, trained_on(workdir), corpus)):
            say(f"{different}; training does not go on with these\n")
        program = make_program(config, batch, corpus.tokenizer.vocab_size)
        rows = describe(corpus, program, workdir)
    say(f"plan\n{format_table(rows)}")
    for remark in remarks(program):
        say(f"note: {remark}")
    say(format_table(compile_step(program, say)))
    return 0


def planned_vocab_size(config: TokenizerConfig) -> int:
    """How many ids the tokenizer will have, without the corpus that it may be trained on."""
    if config.path:
        return load_tokenizer(config.path).vocab_size
    fixed = KINDS[config.kind].fixed
    return config.vocab_size if fixed is None else fixed(config.num_reserved).vocab_size


def run_train(
    config: Config,
    batch: BatchArithmetic,
    workdir: pathlib.Path,
    started: float,
    check_lock: Callable[[], None],
) -> int:
    """Trains from wherever `workdir` stands to train.num_updates, and writes its report."""
    with StopRequest(at_once=True) as stop:
        try:
            return train_in(config, batch, workdir, started, stop, check_lock)
        except Stopped:  # before or after training, which is stopped in its own way
            say("\nstopped; the same command goes on from there")
            return stop.exit_code


def train_in(
    config: Config,
    batch: BatchArithmetic,
    workdir: pathlib.Path,
    started: float,
    stop: StopRequest,
    check_lock: Callable[[], None],
) -> int:
    """The same, unless `stop` raises Stopped."""
    corpus = read_corpus(config, batch, workdir)
    asked = make_probes(corpus, config)
    under_way = standing.has_window(workdir)
    so_far = saved_config(workdir)
    program = make_program(config, batch, corpus.tokenizer.vocab_size, accumulates=under_way)
    check_state_fits(program)
    with open_checkpoints(workdir, "checkpoints", config.checkpoint, check_lock) as checkpoints:
        state, position = resume_or_init(program, corpus, checkpoints, workdir)
        steering = program.steering
        finished = position.tokens >= steering.num_tokens
        if hosts.is_primary():
            standing.check_metrics(workdir, position.update, warn)
            lasting = config if not finished else as_long_as_before(config, workdir)
            write_json(workdir / "config.json", lasting.to_dict())
            save_tokenizer(workdir, corpus.tokenizer)
            write_record(workdir, corpus)
        plan = describe(corpus, program, workdir, position.update)
        say(f"plan\n{format_table(plan)}\n")
        for remark in [] if finished else remarks(program, so_far, position.tokens):
            say(f"note: {remark}\n")
        ready = f"ready after {time.perf_counter() - started:.0f} s"
        done = f"finished: {position.update:,} updates are done, and train.num_updates="
        done += f"{config.train.num_updates} asks for no more"
        say(done if finished else f"{ready}; the first update compiles")
        recorder = Recorder(
            workdir,
            resume_update=position.update,
            num_tokens=steering.num_tokens,
            tokens_per_update=steering.tokens_per_update,
            on_closed=lambda: stop.ask(OUTPUT_CLOSED),
        )
        run = make_run(program, corpus, workdir, checkpoints, stop, check_lock)
        try:
            with recorder:
                result = train(run, state, position, recorder, checkpoints, stop)
        except (TrainingFailed, FollowUpFailed) as error:
            if hosts.is_primary():
                complain(str(error))
                if isinstance(error, TrainingFailed):  # an update that was under way is behind the damage
                    standing.remove_window(workdir)
                write_report(workdir)
            return 1
    if hosts.is_primary() and result.position.window is None:
        standing.remove_window(workdir)
    what = "probing"
    try:
        if not result.stopped:
            params = program.eval_params(result.state)
            probe(program, asked, params, result.position.update, workdir, stop.watch)
        what = "writing its summary and report"
        if hosts.is_primary():
            finish(corpus, workdir, config, result, plan, trained=not finished)
    except BrokenPipeError:
        raise
    except Exception as error:
        saved = f"training up to update {result.position.update} is saved in {workdir / 'checkpoints'}"
        complain(describe_failure(saved, what, error))
        return 1
    return stop.exit_code if result.stopped else 0


def as_long_as_before(config: Config, workdir: pathlib.Path) -> Config:
    """`config` with the train.num_updates of the run in `workdir`, should that be more: nothing done is undone."""
    saved = saved_config(workdir)
    if saved is None or saved["train"]["num_updates"] <= config.train.num_updates:
        return config
    train = dataclasses.replace(config.train, num_updates=saved["train"]["num_updates"])
    return dataclasses.replace(config, train=train)


def run_evaluate(config: Config, batch: BatchArithmetic, workdir: pathlib.Path, checkpoint: str) -> int:
    """Prints the held-out results of a checkpoint; of what checkpoint.init_from names where there is no run yet."""
    untrained = saved_config(workdir) is None and not standing.has_begun(workdir)
    if untrained and checkpoint != "latest":
        raise UserError(
            f"--checkpoint={checkpoint} is of a run, and --workdir={workdir} holds none; "
            "name the checkpoint of checkpoint.init_from by --config.checkpoint.init_checkpoint"
        )
    corpus = read_corpus(config, batch, workdir)
    if corpus.held_out is None:
        raise UserError("data.held_out_fraction=0 leaves nothing to evaluate on; train with a part held out")
    asked = make_probes(corpus, config)
    program = make_program(config, batch, corpus.tokenizer.vocab_size)
    if untrained:
        workdir = pathlib.Path(config.checkpoint.init_from)
        update, params = initial_params(program)
    else:
        update, params = load_params(program, workdir, checkpoint)
    if different := describe_difference(workdir, trained_on(workdir, update), corpus):
        say(f"{different}; what follows is of those here\n")
    if hosts.is_primary():
        mend_tokenizer(workdir, corpus, different)
    results = score_held_out(program, corpus, params)
    rows = {
        "checkpoint": f"update {update} of {workdir}",
        "held out": f"{corpus.held_out_plan.num_documents:,} documents, {corpus.held_out_bytes:,} bytes, "
        f"{corpus.held_out_plan.num_tokens:,} tokens",
    }
    say(format_table(rows | describe_results(results) | describe_compression(corpus)))
    if asked:
        probe(program, asked, params, update, workdir)
        if hosts.is_primary():
            say(format_table({"report": str(write_report(workdir))}))
    return 0


def run_generate(
    config: Config, batch: BatchArithmetic, workdir: pathlib.Path, checkpoint: str, prompts: Sequence[str]
) -> int:
    """Continues the prompts: one is streamed, several are shown one after the other when all are done."""
    tokenizer = own_tokenizer(workdir)
    program = make_program(config, batch, tokenizer.vocab_size)
    _, params = load_params(program, workdir, checkpoint)
    prompts = list(prompts) or [""]
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    decoders = [StreamDecoder(tokenizer, continuing=bool(prompt)) for prompt in prompts]
    texts = list(prompts)
    streams = len(prompts) == 1 and hosts.is_primary()
    if streams:
        show(prompts[0], end="")
    for new in generator(program, tokenizer)(params, ids):
        for row, token in enumerate(new):
            if token is not None:
                text = decoders[row].push(token)
                texts[row] += text
                if streams:
                    show(text, end="")
    for row, decoder in enumerate(decoders):
        rest = decoder.flush()
        texts[row] += rest
        if streams:
            show(rest)
    if not streams:
        for number, text in enumerate(texts, 1):
            say(f"--- {number}\n{text}")
    return 0


def make_run(
    program: Program,
    corpus: Corpus,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    stop: StopRequest,
    check_lock: Callable[[], None] = lambda: None,
) -> Run:
    """What the loop needs to know of everything else; what takes long heeds `stop`."""
    config, batch = program.config, program.batch

    def held_out(state: TrainState) -> dict[str, float]:
        return score_held_out(program, corpus, program.eval_params(state), stop.watch)

    def sample(state: TrainState, update: int) -> None:
        samples = sample_texts(program, corpus, program.eval_params(state), stop.watch)
        if hosts.is_primary():
            write_samples(workdir / "samples.md", update, samples)

    def describe_batch(first: int, count: int) -> str:
        documents = corpus.train.documents(np.arange(first, first + count))
        return "documents " + ", ".join(f"{name} [tokens {start}:{stop}]" for name, start, stop in documents)

    def name_guilty(state: TrainState, first: int, count: int) -> str:
        losses = lambda params, arrays: program.token_losses(params, program.place(arrays))  # noqa: E731
        guilty = documents_not_finite(losses, program.eval_params(state), corpus.train, first, count)
        if not guilty:
            return "by itself each document has a finite loss now"
        return "not finite by itself: " + ", ".join(
            f"{name} [tokens {start}:{stop}]" for name, start, stop in guilty
        )

    def write_documents(name: str, first: int, count: int) -> str:
        path = workdir / "documents" / f"{name}.md"
        if hosts.is_primary():
            write_atomically(path, corpus.train_text(first, count))
        return str(path)

    def save_window(state: TrainState, meta: dict) -> None:
        with open_checkpoints(workdir, "window", WINDOW, check_lock) as windows:
            windows.save(meta["cursor"], state, meta)

    def loss(state: TrainState, batch: Batch) -> float:
        sums = program.eval_step(program.eval_params(state), one_micro_batch(program, batch))
        sums = jax.device_get(sums)
        return float(sums.loss) / max(float(sums.weight), 1.0)

    def begin() -> TrainState:
        params = initial_params(program)[1] if config.checkpoint.init_from else None
        return program.init(params)

    versions = {"python": sys.version.split()[0], "llmjax": llmjax.__version__}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    return Run(
        steering=program.steering,
        micro_batch_size=batch.micro_batch_size,
        seq_len=batch.seq_len,
        evaluate_every=config.evaluate.every,
        statistics_every=config.train.statistics_every,
        fused=program.fused,
        step=program.train_step,
        make_batches=lambda cursor, length: program.batches(corpus.train, start=cursor, length=length),
        evaluate=None if corpus.held_out is None else held_out,
        sample=sample,
        loss=loss,
        begin=begin,
        restore=lambda: restore(program, checkpoints),
        statistics=lambda state, batch: layer_statistics(program, state, batch),
        describe_batch=describe_batch,
        name_guilty=name_guilty,
        write_documents=write_documents,
        saved=program.saved,
        save_window=save_window,
        meta={"config": config.to_dict(), "versions": versions, "data_fingerprint": corpus.fingerprint},
        flops_per_token={
            length: program.model.flops_per_token(corpus.train_plan.attended_in(length))
            for length in program.steering.lengths.lengths
        },
        peak_flops=peak_flops(list(program.mesh.devices.flat)),
    )


def one_micro_batch(program: Program, batch: Batch) -> Batch:
    """The first micro-batch of what a call of the step takes."""
    return jax.tree.map(lambda x: x[0], batch) if program.fused else batch


def layer_statistics(program: Program, state: TrainState, batch: Batch) -> dict[str, Any]:
    """The statistics of each layer on a micro-batch, as plain numbers."""
    values = jax.device_get(program.statistics(state.params, one_micro_batch(program, batch)))
    return jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), values)


def score_held_out(program: Program, corpus: Corpus, params: Params, watch: Watch = iter) -> dict[str, float]:
    """Loss, perplexity and bits per byte over every held-out target; `watch` sees the batches go by."""
    size = program.config.evaluate.batch_size or program.batch.micro_batch_size
    with program.batches(corpus.held_out, stop=corpus.held_out_plan.num_rows, batch_size=size) as feed:
        return evaluate(program.eval_step, params, watch(feed), corpus.held_out_bytes)


def make_probes(corpus: Corpus, config: Config) -> dict[str, Probe]:
    """The probes that the config asks for."""
    if corpus.held_out is None:
        return {}
    text = Text(corpus.held_out, corpus.held_out_ids, corpus.tokenizer)
    return probes.make_probes(config.evaluate.probes, config.evaluate.probe_lengths, text)


def probe(
    program: Program,
    asked: Mapping[str, Probe],
    params: Params,
    update: int,
    workdir: pathlib.Path,
    watch: Watch = iter,
) -> None:
    """Runs the probes on the parameters of `update`, says what they show and writes it to probes.json.

    `watch` sees each batch of texts go by.
    """
    if not asked:
        return
    say(f"\nprobing {', '.join(asked)}")

    def losses(params: Params, arrays: Arrays) -> tuple[Any, Any]:
        (arrays,) = watch([arrays])
        return program.token_losses(params, program.place(arrays))

    results = probes.run_probes(asked, losses, params, program.probe_shape)
    if hosts.is_primary():
        write_json(workdir / "probes.json", {"update": update, **results})
    say(format_table(probes.describe(results)))


def sample_texts(
    program: Program, corpus: Corpus, params: Params, watch: Watch = iter
) -> list[tuple[str, str]]:
    """(prompt, continuation) of the longest held-out document's beginning, or of nothing where none is held out.

    `watch` sees each token go by.
    """
    tokenizer, store, prompt = corpus.tokenizer, corpus.store, [corpus.tokenizer.bos_id]
    if len(corpus.held_out_ids):
        doc = int(corpus.held_out_ids[np.argmax(store.lengths[corpus.held_out_ids])])
        length = min(SAMPLE_PROMPT, int(store.lengths[doc]) // 2, program.config.data.seq_len // 2)
        prompt = store.tokens(doc, 0, max(length, 1)).tolist()
    new = [ids[0] for ids in watch(generator(program, tokenizer)(params, [prompt])) if ids[0] is not None]
    return [(tokenizer.decode(prompt[1:]), tokenizer.decode(new))]


def generator(
    program: Program, tokenizer: Tokenizer
) -> Callable[[Params, Sequence[Sequence[int]]], Iterator[list]]:
    """Sampling with the config's settings; ids that stand for no text, other than the end, are never drawn."""
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id, *tokenizer.reserved_ids}
    learned = POSITIONS[program.config.model.position].table
    return make_generator(
        program.model,
        program.config.generate,
        eos_id=tokenizer.eos_id,
        banned_ids=sorted(special - {tokenizer.eos_id}),
        max_positions=program.config.data.seq_len if learned else 0,
    )


def describe_results(results: Mapping[str, float]) -> dict[str, str]:
    """Held-out results in words."""
    return {
        "held-out loss": f"{results['loss']:.4f} nats per token",
        "perplexity": f"{results['perplexity']:.2f}",
        "bits per byte": f"{results['bits_per_byte']:.3f}",
    }


def describe_compression(corpus: Corpus) -> dict[str, str]:
    """What gzip and xz make of the held-out text."""
    text = corpus.held_out_text(COMPRESSED)
    part = "" if len(text) >= corpus.held_out_bytes else f", on the first {len(text):,} bytes"
    return {
        name: f"{bits:.3f} bits per byte of the same text{part}"
        for name, bits in compressed_bits_per_byte(text).items()
    }


def finish(
    corpus: Corpus,
    workdir: pathlib.Path,
    config: Config,
    result: Result,
    plan: dict[str, str],
    trained: bool = True,
) -> None:
    """The closing words, and the files that repeat them: summary.json and report.html."""
    results = {}
    if result.position.evaluation is not None:
        results = describe_results(result.position.evaluation) | describe_compression(corpus)
    sample = last_sample(workdir / "samples.md")
    opening = (
        sample[0].strip().split("\n")[0][:20] if sample and config.data.sources != ("stdlib",) else "import "
    )
    done = math.ceil(result.position.tokens / (config.train.tokens_per_update or 1))
    following = commands(workdir, max(config.train.num_updates, done), opening)
    write_json(
        workdir / "summary.json",
        {"title": f"llmjax {workdir.name}", "plan": plan, "results": results, "commands": following},
    )
    report = write_report(workdir)
    if result.stopped:
        window = result.position.window
        where = f"after update {result.position.update}"
        if window is not None:
            where += f" and {len(window.metrics)} of {window.steps} micro-steps of the next"
        say(f"\nstopped {where} and saved; go on with\n  {following['resume']}")
        return
    if sample is not None:
        say(f"\nsample: after\n{indent(sample[0])}\nthe model continued\n{indent(sample[1])}")
    rows = format_table(results | {"report": str(report)})
    seconds = f"{result.position.seconds:.0f} s"
    say(f"\ndone after {seconds}\n{rows}" if trained else f"\nfinished before, after {seconds}\n{rows}")
    say(f"\nnext\n{format_table(following)}")
