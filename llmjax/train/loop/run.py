"""What the training loop is given: the parts of a run, the record it writes into, and where a run ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from llmjax.scores import Score
from llmjax.train.loop.run_position import Position
from llmjax.train.steering.steering import Steering
from llmjax.train.update.engine import Engine, Feed

State = Any  # as in `state.TrainState`
Evaluation = dict[str, float]


class Record(Protocol):
    """Where the loop writes what happens, update by update; `workdir/recorder.py` is one."""

    def train(self, update: int, values: dict[str, float | str]) -> None:
        """Records one update."""

    def evaluate(self, update: int, values: dict[str, float]) -> None:
        """Records one evaluation on held-out text."""

    def statistics(self, update: int, values: dict[str, Any]) -> None:
        """Records what the layers look like: numbers, lists of numbers, and dicts of both."""

    def event(self, update: int, event: str, text: str) -> None:
        """Records and shows what a person should know."""

    def rewind(self, update: int) -> None:
        """Forgets what was recorded after `update`, to which the run has gone back."""

    def forget(self, update: int) -> None:
        """Forgets the evaluation and the statistics of `update`, the last one, for they are made anew."""

    def flush(self) -> None:
        """Puts everything recorded so far on disk, as a checkpoint that follows it relies on."""


class Batches(Feed, Protocol):
    """Where an engine finds its batches, until it is closed."""

    def close(self) -> None:
        """Ends the thread that makes them."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of. Callables come from outside: the loop knows neither data nor evaluation.

    Cadences count `steering.tokens_per_update` tokens as one update, so that they do not depend on how large
    updates are.

    steering            decides about each update
    micro_batch_size    sequences per micro-step, over all devices
    seq_len             positions per sequence
    evaluate_every      updates between evaluations; 0: only at the end
    statistics_every    updates between per-layer statistics; 0: never
    engine              of gradient accumulation: how `step` is called
    step                (state, batch, inputs) -> (state, metrics), compiled; metrics as in `step.make_train_step`
    make_batches        (cursor, length) -> the batches on the devices, from that sequence on, cut into rows of `length`
    score               of an evaluation by which the best checkpoint is chosen, and which must be finite
    evaluate            state -> held-out scores by name (the same on every process), or None
                        where nothing is held out
    restore             () -> the state and the position of the latest checkpoint
    sample              (state, update) -> None, after each evaluation
    loss                (state, batch) -> the mean loss of a micro-batch with the parameters as they are now
    begin               () -> the state with which a new run begins, made anew
    statistics          (state, batch) -> what is recorded of the layers
    describe_batch      (first sequence, count) -> the documents in them, for a message
    name_guilty         (state, first sequence, count) -> the documents in them whose loss is not finite with the
                        parameters as they are now, for a message
    write_documents     (name, first sequence, count) -> the file into which their text was written, for a message
    saved               state -> what a checkpoint holds of it
    save_partial_update         (state, meta) -> None, saves an update under way
    meta                what else goes into each checkpoint: config, versions, data fingerprint
    flops_per_token     of the model, forward and backward, for each length of rows; only with `peak_flops`
    peak_flops          per second, of all devices together; 0: unknown
    """

    steering: Steering
    engine: Engine
    micro_batch_size: int
    seq_len: int
    evaluate_every: int
    step: Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]]
    make_batches: Callable[[int, int], Batches]
    evaluate: Callable[[State], Evaluation] | None
    score: Score
    restore: Callable[[], tuple[State, Position]]
    describe_batch: Callable[[int, int], str]
    write_documents: Callable[[str, int, int], str]
    save_partial_update: Callable[[State, dict], None]
    statistics_every: int = 0
    sample: Callable[[State, int], None] = lambda state, update: None
    statistics: Callable[[State, Any], dict[str, Any]] = lambda state, batch: {}
    loss: Callable[[State, Any], float] | None = None
    name_guilty: Callable[[State, int, int], str] | None = None
    begin: Callable[[], State] | None = None
    saved: Callable[[State], State] = lambda state: state
    meta: dict = dataclasses.field(default_factory=dict)
    flops_per_token: Mapping[int, float] = dataclasses.field(default_factory=dict)
    peak_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended, and whether it was asked to stop before its end."""

    state: State
    position: Position
    stopped: bool
