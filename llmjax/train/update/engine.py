"""What an engine of gradient accumulation is: the state that it keeps, the step that it compiles, how the host runs it.

`engines.py` is the table of them. The loop, the builder and the checkpoints know the methods of `Engine` and no engine
by its name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llmjax.train.optim.offload import to_device
from llmjax.train.optim.optimizer import Optimizer, OptState
from llmjax.train.optim.param_roles import Roles
from llmjax.train.update.accumulate import Outcome, PartialUpdate, UpdateInputs
from llmjax.train.update.gradients import LossFn, Terms, empty_terms
from llmjax.train.update.step import Metrics, TrainStep, make_train_step
from llmjax.types import Array, Batch, Params

MicroMetrics = dict[str, float]  # the numbers of one micro-step
Specs = Any  # the tree of the parameters, of PartitionSpec


class Feed(Protocol):
    """Where an engine finds its batches."""

    def __next__(self) -> Batch:
        """The next micro-batch; StopIteration where there is none."""

    def take(self, count: int) -> Batch:
        """The next `count` micro-batches in one, each field with a leading dimension of `Engine.lead`."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Heeded by the engines that bring weights together themselves.

    gather         how often they do over mesh.fsdp: `compute.gather`
    compute_dtype  what they cast weights to: `model.dtype`
    """

    gather: str = "micro_step"
    compute_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What came of dispatching micro-steps: nothing here waits for the device.

    state    after them
    batch    that the last call of the step took
    metrics  of each call, on the device
    steps    micro-steps dispatched
    waited   seconds spent waiting for batches
    """

    state: Any
    batch: Batch
    metrics: list[Metrics]
    steps: int
    waited: float


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine whose sums live within one call, or the base of one that sums over several.

    Between updates only the optimizer's own state means anything: `canonical` gives it, and `restore` takes it up
    again, with any engine and any `max_steps`, so that a checkpoint between updates never says how its batches were
    cut.

    max_steps  the most micro-steps that an update can have
    terms      names of the loss terms with weights of their own, each of which is summed apart
    """

    optimizer: Optimizer
    max_steps: int = 1
    terms: tuple[str, ...] = ()
    options: EngineOptions = EngineOptions()

    # --- the state ---

    @property
    def keeps_sums(self) -> bool:
        """Whether the state holds the sums of a partial update, wrapped around the optimizer's own."""
        return False

    def init(self, params: Params) -> OptState:
        """The state before the first update."""
        return self.restore(self.optimizer.init(params), params, jnp.zeros([], jnp.int32))

    def restore(self, opt_state: OptState, params: Params, update: Array) -> OptState:
        """The state after `update` updates, with no micro-step done since, from the optimizer's own state."""
        if not self.keeps_sums:
            return opt_state
        empty = {"terms": empty_terms(params, self.terms), "loss": jnp.zeros([], jnp.float32)}
        return PartialUpdate(
            jnp.ones([], jnp.int32),
            optax.MultiStepsState(jnp.zeros([], jnp.int32), update, opt_state, empty),
        )

    def canonical(self, state: OptState) -> OptState:
        """The optimizer's own state, all there is to save between two updates."""
        return state.multi.inner_opt_state if self.keeps_sums else state

    def eval_params(self, state: OptState, params: Params) -> Params:
        """The parameters to evaluate and to generate with."""
        own = self.canonical(state)
        return self.optimizer.eval_params(to_device(own) if self.optimizer.offload else own, params)

    # --- the compiled step ---

    @property
    def manual(self) -> tuple[str, ...]:
        """The mesh axes along which gradients stay apart until the update ends; models are built for that."""
        return ()

    def make_step(self, loss_fn: LossFn, mesh: Mesh, param_specs: Specs, roles: Roles) -> TrainStep:
        """`step(state, batch, inputs) -> (state, metrics)`, to be jitted with `state` donated.

        `loss_fn` is of a model whose `Layout` has the axes `manual`.
        """
        raise NotImplementedError

    # --- the host's side ---

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions of what a call of the step takes, before those of a micro-batch."""
        raise NotImplementedError

    @property
    def stops_within(self) -> bool:
        """Whether an update can be left between two of its micro-steps, and gone on with."""
        raise NotImplementedError

    def next_batch(self, feed: Feed, left: int) -> tuple[Batch, int]:
        """What the next call of the step takes, and its micro-steps, where `left` of them are to be done."""
        raise NotImplementedError

    def one_micro_batch(self, batch: Batch) -> Batch:
        """The first micro-batch of what a call of the step takes."""
        raise NotImplementedError

    def micro_metrics(self, fetched: Sequence[dict[str, Any]], steps: int) -> list[MicroMetrics]:
        """The numbers of each of `steps` micro-steps, from the metrics of each call."""
        raise NotImplementedError

    def update(
        self,
        step: TrainStep,
        state: Any,
        feed: Feed,
        inputs: UpdateInputs,
        *,
        left: int,
        is_asked_to_stop: Callable[[], bool],
    ) -> Progress:
        """Dispatches the `left` micro-steps that an update still has, or fewer where it is asked to stop in between.

        `state` is donated. StopIteration where `feed` ends too early.
        """
        metrics: list[Metrics] = []
        done, waited = 0, 0.0
        while True:
            began = time.perf_counter()
            batch, count = self.next_batch(feed, left - done)
            waited += time.perf_counter() - began
            state, values = step(state, batch, inputs)
            metrics.append(values)
            done += count
            if done >= left or is_asked_to_stop():
                return Progress(state, batch, metrics, done, waited)


class EachMicroStep(Engine):
    """The base of engines with one call of the step for each micro-step."""

    def micro_step(
        self, params: Params, state: OptState, terms: Terms, loss: Array, inputs: UpdateInputs
    ) -> tuple[Params, OptState, Outcome]:
        """Takes the sums of a micro-batch, all of them finite; on the last micro-step of an update, updates."""
        raise NotImplementedError

    def make_step(self, loss_fn: LossFn, mesh: Mesh, param_specs: Specs, roles: Roles) -> TrainStep:
        return make_train_step(loss_fn, self.micro_step)

    @property
    def lead(self) -> tuple[int, ...]:
        return ()

    @property
    def stops_within(self) -> bool:
        return True

    def next_batch(self, feed: Feed, left: int) -> tuple[Batch, int]:
        return next(feed), 1

    def one_micro_batch(self, batch: Batch) -> Batch:
        return batch

    def micro_metrics(self, fetched: Sequence[dict[str, Any]], steps: int) -> list[MicroMetrics]:
        return [{name: float(value) for name, value in call.items()} for call in fetched]


class WholeUpdate(Engine):
    """The base of engines with one call of the step for all micro-steps of an update."""

    @property
    def lead(self) -> tuple[int, ...]:
        return (self.max_steps,)

    @property
    def stops_within(self) -> bool:
        return False

    def next_batch(self, feed: Feed, left: int) -> tuple[Batch, int]:
        return feed.take(left), left

    def one_micro_batch(self, batch: Batch) -> Batch:
        return jax.tree.map(lambda x: x[0], batch)

    def micro_metrics(self, fetched: Sequence[dict[str, Any]], steps: int) -> list[MicroMetrics]:
        (rows,) = fetched
        return [{name: float(row[i]) for name, row in rows.items()} for i in range(steps)]
