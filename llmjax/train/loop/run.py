"""What the training loop is given and gives back: the parts of a run, the record it writes, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from llmjax.scores.score import Score
from llmjax.train.loop.profiler import Profiler
from llmjax.train.loop.run_position import Position
from llmjax.train.steering.steering import Steering
from llmjax.train.update.engine import Engine, Feed

# A `state.TrainState`, or a stand-in in tests.
State = Any
Evaluation = dict[str, float]


class Record(Protocol):
    """Where the loop writes what happens, update by update; `workdir/recorder.py` is one."""

    def train(self, update: int, values: dict[str, float | str]) -> None:
        """Records one update."""

    def evaluate(self, update: int, values: dict[str, float]) -> None:
        """Records one evaluation on held-out text."""

    def statistics(self, update: int, values: dict[str, Any]) -> None:
        """Records the statistics of the layers: numbers, lists of numbers, and dicts of both."""

    def event(self, update: int, event: str, text: str) -> None:
        """Records and shows what a person should know."""

    def rewind(self, update: int) -> None:
        """Removes the lines after `update`, to which the run has gone back."""

    def forget(self, update: int) -> None:
        """Removes the evaluation and the statistics of `update`, the last one, because they are made again."""

    def flush(self) -> None:
        """Puts everything recorded so far on disk, before a checkpoint is saved that relies on it."""


class Batches(Feed, Protocol):
    """A feed of batches that ends with `close`."""

    def close(self) -> None:
        """Ends the thread that makes them."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run. Data and evaluation come in as callables, so that the loop knows neither.

    Every `steering.tokens_per_update` tokens count as one update for evaluate_every and statistics_every, so that these
    do not depend on how large single updates are.

    steering            decides about each update
    micro_batch_size    sequences per micro-step, over all devices
    seq_len             positions per sequence
    weighs_all          whether every token of a document has weight 1, so that their sum says how full the rows are
    evaluate_every      updates between evaluations; 0 = only at the end
    patience            the run ends after as many evaluations in a row without a better score; 0 = never
    statistics_every    updates between per-layer statistics; 0 = never
    engine              the engine of gradient accumulation, which calls `step`
    step                (state, batch, inputs) -> (state, metrics), compiled; metrics as in `step.make_train_step`
    make_batches        (cursor, length) -> the batches on the devices, from that sequence on, cut into rows of `length`
    score               the score of an evaluation that chooses the best checkpoint; the run fails if it is not finite
    evaluate            state -> held-out scores by name (the same on every process), or None
                        where nothing is held out
    restore             () -> the state and the position of the latest checkpoint
    sample              (state, update) -> None, after each evaluation
    loss                (state, batch) -> the mean loss of the first micro-batch in `batch`
    begin               () -> a new state, the same with which the run began
    statistics          (state, batch) -> what is recorded of the layers
    describe_batch      (first sequence, count) -> the documents in them, for a message
    name_guilty         (state, first sequence, count) -> the documents in them whose loss is not finite with the
                        parameters as they are now, for a message
    write_documents     (name, first sequence, count) -> the file into which their text was written, for a message
    saved               state -> the state as a checkpoint holds it
    save_partial_update (state, meta) -> None, saves an update that was stopped between two micro-steps
    meta                what each checkpoint holds besides the position: config, versions, data fingerprint
    flops_per_token     of the model, forward and backward, for each length of rows; only with `peak_flops`
    peak_flops          per second, of all devices together; 0: unknown
    profiler            traces some updates
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
    weighs_all: bool = True
    patience: int = 0
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
    profiler: Profiler = dataclasses.field(default_factory=Profiler)


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run ended, and whether it was asked to stop before its end."""

    state: State
    position: Position
    stopped: bool
