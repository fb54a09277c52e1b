"""What an engine of gradient accumulation is: the state it keeps, the step it compiles, and how the host runs it.

`engines.py` is the table of all engines. The loop, the builder and the checkpoints use the methods of `Engine` and know
no engine by its name.
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
from llmjax.train.tuning.tuning import WHOLE, Tuning
from llmjax.train.update.accumulate import Outcome, PartialUpdate, UpdateInputs
from llmjax.train.update.gradients import LossFn, Terms, empty_terms
from llmjax.train.update.step import Metrics, TrainStep, make_train_step
from llmjax.types import Array, Batch, Params

# The metrics of one micro-step.
MicroMetrics = dict[str, float]
# A tree like the parameters, of PartitionSpecs.
Specs = Any


class Feed(Protocol):
    """Where an engine finds its batches."""

    def __next__(self) -> Batch:
        """The next micro-batch; StopIteration where there is none."""

    def take(self, count: int) -> Batch:
        """The next `count` micro-batches, stacked along the leading dimension `Engine.lead`."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Options of engines that gather weights over mesh.fsdp themselves; the other engines ignore them.

    gather         how often weights are gathered: `compute.gather`
    compute_dtype  the dtype that weights are cast to: `model.dtype`
    """

    gather: str = "micro_step"
    compute_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Progress:
    """The result of dispatching micro-steps. Its arrays may still be computed by the device.

    state    the state after the micro-steps
    batch    the batch of the last call of the step
    metrics  the metrics of each call, on the device
    steps    how many micro-steps were dispatched
    waited   seconds spent waiting for batches
    """

    state: Any
    batch: Batch
    metrics: list[Metrics]
    steps: int
    waited: float


@dataclasses.dataclass(frozen=True)
class Engine:
    """The base of all engines.

    Between two updates only the optimizer's own state matters. `canonical` extracts it for a checkpoint, and `restore`
    makes an engine's state of it, with any engine and any `max_steps`. A checkpoint between updates therefore does not
    depend on how batches were cut.

    max_steps  the most micro-steps that an update can have
    terms      names of the loss terms that have weights of their own; each is summed apart
    options    see `EngineOptions`
    """

    optimizer: Optimizer
    max_steps: int = 1
    terms: tuple[str, ...] = ()
    options: EngineOptions = EngineOptions()

    # --- the state ---

    @property
    def keeps_sums(self) -> bool:
        """Whether the state is a `PartialUpdate` around the optimizer's own state, with sums over several calls."""
        return False

    def init(self, params: Params) -> OptState:
        """The state before the first update."""
        return self.restore(self.optimizer.init(params), params, jnp.zeros([], jnp.int32))

    def restore(self, opt_state: OptState, params: Params, update: Array) -> OptState:
        """The engine's state after `update` whole updates, made of the optimizer's own state."""
        if not self.keeps_sums:
            return opt_state
        empty = {"terms": empty_terms(params, self.terms), "loss": jnp.zeros([], jnp.float32)}
        return PartialUpdate(
            jnp.ones([], jnp.int32),
            optax.MultiStepsState(jnp.zeros([], jnp.int32), update, opt_state, empty),
        )

    def canonical(self, state: OptState) -> OptState:
        """The optimizer's own state, which a checkpoint between two updates holds."""
        return state.multi.inner_opt_state if self.keeps_sums else state

    def eval_params(self, state: OptState, params: Params) -> Params:
        """The parameters to evaluate and to generate with."""
        own = self.canonical(state)
        return self.optimizer.eval_params(to_device(own) if self.optimizer.offload else own, params)

    # --- the compiled step ---

    @property
    def manual(self) -> tuple[str, ...]:
        """The mesh axes along which each device keeps gradients of its own until the update ends.

        The model must be built with a `Layout` for which these axes are manual.
        """
        return ()

    def make_step(
        self, loss_fn: LossFn, mesh: Mesh, param_specs: Specs, roles: Roles, tuning: Tuning = WHOLE
    ) -> TrainStep:
        """`step(state, batch, inputs) -> (state, metrics)`, to be jitted with `state` donated.

        `param_specs` and `roles` are those of the parameters that train, and `tuning` says which these are.

        `loss_fn` is the loss of a model whose `Layout` has the manual axes `manual`.
        """
        raise NotImplementedError

    # --- the host's side ---

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions that the batch of a call of the step has before those of a micro-batch: () or (max_steps,)."""
        raise NotImplementedError

    @property
    def stops_within(self) -> bool:
        """Whether an update can be stopped between two micro-steps and resumed there."""
        raise NotImplementedError

    def next_batch(self, feed: Feed, left: int) -> tuple[Batch, int]:
        """The batch for the next call of the step, and the number of micro-steps in it, of the `left` that remain."""
        raise NotImplementedError

    def one_micro_batch(self, batch: Batch) -> Batch:
        """The first micro-batch in the batch of a call of the step."""
        raise NotImplementedError

    def micro_metrics(self, fetched: Sequence[dict[str, Any]], steps: int) -> list[MicroMetrics]:
        """The metrics of each of `steps` micro-steps, from the metrics of each call of the step."""
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
        """Dispatches the `left` micro-steps that remain of an update, or fewer where it is asked to stop in between.

        `state` is donated. Raises StopIteration where `feed` ends too early.
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
    """The base of engines that call the step once for each micro-step."""

    def micro_step(
        self, params: Params, state: OptState, terms: Terms, loss: Array, inputs: UpdateInputs
    ) -> tuple[Params, OptState, Outcome]:
        """Adds the sums of a micro-batch, which are finite, to the state; on the last micro-step, makes the update.

        terms  the gradient sums of each loss term
        loss   float32 [], the loss sum of the main term
        """
        raise NotImplementedError

    def make_step(
        self, loss_fn: LossFn, mesh: Mesh, param_specs: Specs, roles: Roles, tuning: Tuning = WHOLE
    ) -> TrainStep:
        return make_train_step(loss_fn, self.micro_step, tuning)

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
    """The base of engines that call the step once for all micro-steps of an update."""

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
