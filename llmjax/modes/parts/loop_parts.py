"""Makes the `Run` that the training loop gets: evaluation, sampling, messages and saves as plain functions.

The training loop knows neither the corpus nor the workdir. It only calls these functions.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

import llmjax
from llmjax.build.corpus import Corpus
from llmjax.build.placement import Feed
from llmjax.build.program import Program
from llmjax.build.restore import (
    KEEP_NEWEST,
    begin_with,
    initial_params,
    open_checkpoints,
    restore,
)
from llmjax.build.tuning.frozen import fingerprint_of
from llmjax.errors import choose
from llmjax.evaluate.not_finite import documents_not_finite
from llmjax.files import write_atomically
from llmjax.modes.evaluate import score_held_out
from llmjax.modes.samples.table import SAMPLES
from llmjax.parallel import hosts
from llmjax.parallel.devices import peak_flops
from llmjax.scores import confusion
from llmjax.terminal.stages import working
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.loop.run import Run
from llmjax.train.loop.stop_request import StopRequest, Watch
from llmjax.train.update.accumulate import UpdateInputs
from llmjax.train.update.state import TrainState
from llmjax.train.update.step import Metrics, TrainStep
from llmjax.types import Batch, Params
from llmjax.workdir import standing
from llmjax.workdir.contents import write_json
from llmjax.workdir.samples import Sample, write_samples

# The packages whose versions a checkpoint records, because they decide a run's numbers.
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


def make_run(
    program: Program,
    corpus: Corpus,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    stop: StopRequest,
    check_lock: Callable[[], None] = lambda: None,
    on_samples: Callable[[int, Sequence[Sample]], None] = lambda update, samples: None,
    compiled: Callable[[], None] = lambda: None,
) -> Run:
    """The `Run` of a program and a corpus. Evaluation and sampling end early where `stop` asks for it.

    check_lock  raises UserError where another run has taken the workdir
    on_samples  called with an update and the texts sampled after it, once they are written, on the first process
    compiled    waits for a thread that compiles the step, if there is one
    """
    config = program.config
    step = _Step(program.train_step, compiled)
    texts = choose(SAMPLES, "task.use", program.task.use).make(program, corpus)
    parts = _Parts(step, program, corpus, workdir, stop, check_lock, on_samples, texts)
    return Run(
        steering=program.steering,
        micro_batch_size=program.batch.micro_batch_size,
        seq_len=program.batch.seq_len,
        weighs_all="weights" not in corpus.train.columns and program.task.sees_both_sides is False,
        evaluate_every=config.evaluate.every,
        patience=config.train.patience,
        statistics_every=config.train.statistics_every,
        engine=program.engine,
        step=parts.step,
        make_batches=parts.make_batches,
        evaluate=None if corpus.held_out is None else parts.evaluate,
        score=program.task.scores[0],
        sample=parts.sample,
        loss=parts.loss,
        begin=parts.begin,
        restore=lambda: restore(program, checkpoints, workdir),
        statistics=parts.statistics,
        describe_batch=parts.describe_batch,
        name_guilty=parts.name_guilty,
        write_documents=parts.write_documents,
        saved=program.saved,
        save_partial_update=parts.save_partial_update,
        meta={
            "config": config.to_dict(),
            "versions": versions(),
            "data_fingerprint": corpus.fingerprint,
            **fingerprint_of(program, workdir),
        },
        flops_per_token={
            length: program.cost(corpus.train_plan.attended_in(length)).flops_per_token
            for length in program.steering.lengths.lengths
        },
        peak_flops=peak_flops(list(program.mesh.devices.flat)),
    )


def versions() -> dict[str, str]:
    """The versions of Python, of llmjax and of the packages that decide a run's numbers, for its checkpoints."""
    ours = {"python": sys.version.split()[0], "llmjax": llmjax.__version__}
    return ours | {name: metadata.version(name) for name in PACKAGES}


@dataclasses.dataclass
class _Step:
    """The compiled step, which says that it compiles.

    step      the jitted step
    wait      waits for a thread that compiles it, if there is one
    compiles  whether its next call may compile: the first one does, and the first one for rows of another length
    """

    step: TrainStep
    wait: Callable[[], None]
    compiles: bool = True

    def __call__(self, state: TrainState, batch: Batch, inputs: UpdateInputs) -> tuple[TrainState, Metrics]:
        if not self.compiles:
            return self.step(state, batch, inputs)
        self.compiles = False
        with working("compiling the update"):
            self.wait()
            return self.step(state, batch, inputs)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The functions of a `Run`, which says what each gets and returns."""

    step: _Step
    program: Program
    corpus: Corpus
    workdir: pathlib.Path
    stop: StopRequest
    check_lock: Callable[[], None]
    on_samples: Callable[[int, Sequence[Sample]], None]
    texts: Callable[[Params, Watch], list[tuple[str, str]]]

    def make_batches(self, cursor: int, length: int) -> Feed:
        self.step.compiles = True
        return self.program.placement.batches(self.corpus.train, start=cursor, length=length)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        params = self.program.eval_params(state)
        details: list[dict[str, Any]] = []
        results = score_held_out(self.program, self.corpus, params, self.stop.watch, details.append)
        if details and hosts.is_primary():
            write_json(self.workdir / confusion.FILE, {"update": int(state.update), **details[0]})
        return results

    def sample(self, state: TrainState, update: int) -> None:
        # Every process takes part in the sampling, and the first one writes.
        with working("sampling"):
            params = self.program.eval_params(state)
            texts = self.texts(params, self.stop.watch)
        if hosts.is_primary():
            samples = [Sample(update, *text) for text in texts]
            write_samples(self.workdir, samples)
            self.on_samples(update, samples)

    def statistics(self, state: TrainState, batch: Batch) -> dict[str, Any]:
        with working("looking at the layers"):
            return layer_statistics(self.program, state, batch)

    def loss(self, state: TrainState, batch: Batch) -> float:
        # With the parameters for evaluation, which some optimizers keep apart from those that they train.
        program = self.program
        sums = program.eval_step(program.eval_params(state), program.engine.one_micro_batch(batch))
        sums = jax.device_get(sums)
        return float(sums.loss) / max(float(sums.weight), 1.0)

    def begin(self) -> TrainState:
        program = self.program
        params = initial_params(program)[1] if program.config.checkpoint.init_from else None
        return begin_with(program, params)

    def describe_batch(self, first: int, count: int) -> str:
        return "documents " + _list_spans(self.corpus.train.documents(np.arange(first, first + count)))

    def name_guilty(self, state: TrainState, first: int, count: int) -> str:
        program = self.program

        def losses(params: Params, arrays: Mapping[str, np.ndarray]) -> Any:
            return program.token_losses(params, program.placement.place(arrays))

        # Each document goes through the model by itself, so that one which is not finite reveals no other.
        guilty = documents_not_finite(losses, program.eval_params(state), self.corpus.train, first, count)
        if not guilty:
            return "by itself each document has a finite loss now"
        return f"not finite by itself: {_list_spans(guilty)}"

    def write_documents(self, name: str, first: int, count: int) -> str:
        path = self.workdir / "documents" / f"{name}.md"
        if hosts.is_primary():
            write_atomically(path, self.corpus.train_text(first, count))
        return str(path)

    def save_partial_update(self, state: TrainState, meta: dict) -> None:
        folder = standing.PARTIAL_UPDATE
        with open_checkpoints(self.workdir, folder, KEEP_NEWEST, self.check_lock) as stopped:
            # Its number is the cursor, because several can be stopped within the same update.
            stopped.save(meta["cursor"], dataclasses.replace(state, frozen={}), meta)


def _list_spans(spans: Iterable[tuple[str, int, int]]) -> str:
    """`a.txt [tokens 0:512], b.txt [tokens 3:9]` from the names of documents and their first and last token."""
    return ", ".join(f"{name} [tokens {start}:{stop}]" for name, start, stop in spans)


def layer_statistics(program: Program, state: TrainState, batch: Batch) -> dict[str, Any]:
    """The statistics of each layer on the first micro-batch of `batch`, as plain numbers and lists of numbers.

    They are those of the whole model, frozen parameters and their gradients included.
    """
    params = program.whole(state.params, state.frozen)
    values = jax.device_get(program.statistics(params, program.engine.one_micro_batch(batch)))
    return jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), values)
