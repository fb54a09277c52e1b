"""Makes the `Run` that the training loop is given: evaluation, samples, messages and saves as plain callables."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import numpy as np

import llmjax
from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.build.restore import (
    KEEP_NEWEST,
    initial_params,
    open_checkpoints,
    restore,
)
from llmjax.evaluate.not_finite import documents_not_finite
from llmjax.files import write_atomically
from llmjax.modes.evaluate import score_held_out
from llmjax.modes.generate import sample_texts
from llmjax.parallel import hosts
from llmjax.parallel.devices import peak_flops
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.loop.run import Run
from llmjax.train.loop.stop_request import StopRequest
from llmjax.train.update.state import TrainState
from llmjax.types import Batch
from llmjax.workdir import standing
from llmjax.workdir.samples import Sample, write_samples

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy")


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
            write_samples(workdir, [Sample(update, *texts) for texts in samples])

    def describe_batch(first: int, count: int) -> str:
        documents = corpus.train.documents(np.arange(first, first + count))
        return "documents " + ", ".join(f"{name} [tokens {start}:{stop}]" for name, start, stop in documents)

    def name_guilty(state: TrainState, first: int, count: int) -> str:
        losses = lambda params, arrays: program.token_losses(params, program.placement.place(arrays))  # noqa: E731
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

    def save_partial_update(state: TrainState, meta: dict) -> None:
        with open_checkpoints(workdir, standing.PARTIAL_UPDATE, KEEP_NEWEST, check_lock) as stopped:
            stopped.save(meta["cursor"], state, meta)

    def loss(state: TrainState, batch: Batch) -> float:
        sums = program.eval_step(program.eval_params(state), program.engine.one_micro_batch(batch))
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
        engine=program.engine,
        step=program.train_step,
        make_batches=lambda cursor, length: program.placement.batches(
            corpus.train, start=cursor, length=length
        ),
        evaluate=None if corpus.held_out is None else held_out,
        score=program.task.scores[0],
        sample=sample,
        loss=loss,
        begin=begin,
        restore=lambda: restore(program, checkpoints),
        statistics=lambda state, batch: layer_statistics(program, state, batch),
        describe_batch=describe_batch,
        name_guilty=name_guilty,
        write_documents=write_documents,
        saved=program.saved,
        save_partial_update=save_partial_update,
        meta={"config": config.to_dict(), "versions": versions, "data_fingerprint": corpus.fingerprint},
        flops_per_token={
            length: program.cost(corpus.train_plan.attended_in(length)).flops_per_token
            for length in program.steering.lengths.lengths
        },
        peak_flops=peak_flops(list(program.mesh.devices.flat)),
    )


def layer_statistics(program: Program, state: TrainState, batch: Batch) -> dict[str, Any]:
    """The statistics of each layer on a micro-batch, as plain numbers."""
    values = jax.device_get(program.statistics(state.params, program.engine.one_micro_batch(batch)))
    return jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), values)
