"""The compiled steps of training and evaluation: pure functions for `build` to jit.

Model, task and optimizer are closed over. Nothing here waits for the device, and a step compiles once for a whole run
(once for each length, where data.length_points has several).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from llmjax.train.optim.optimizer import Optimizer, OptState
from llmjax.train.tuning.tuning import WHOLE, Tuning
from llmjax.train.update.accumulate import Outcome, UpdateInputs, close_update
from llmjax.train.update.gradients import LossFn, Terms, micro_gradients
from llmjax.train.update.state import TrainState
from llmjax.types import Array, Batch, LossSums, Params

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, UpdateInputs], tuple[TrainState, Metrics]]
# (params, opt_state, gradient sums of a micro-batch, its loss sum, inputs) -> (params, opt_state, outcome)
Accumulate = Callable[[Params, OptState, Terms, Array, UpdateInputs], tuple[Params, OptState, Outcome]]


def make_train_step(loss_fn: LossFn, accumulate: Accumulate, tuning: Tuning = WHOLE) -> TrainStep:
    """`train_step(state, batch, inputs) -> (state, metrics)`, one micro-step; jit it with `state` donated.

    On a mesh, give jit the shardings of the state as `out_shardings` too. Otherwise the compiler changes some of them,
    and the next call compiles again.

    All micro-steps of an update share one random key, fold_in(state.rng, state.update). `loss_fn` must draw the
    randomness of a sequence from that key and `batch.index` alone, so that it does not depend on how the batch was cut.

    `loss_fn` gets the parameters of the model, which `tuning` joins. Gradients are those of the trained ones.

    metrics, float32 [] each:
      the sums of `micro_gradients`
      the fields of `Outcome`, which are 0 on micro-steps that do not end an update
    """

    def train_step(state: TrainState, batch: Batch, inputs: UpdateInputs) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.update)

        def loss(trained: Params, batch: Batch, rng: Array | None) -> LossSums:
            return loss_fn(tuning.join(trained, state.frozen), batch, rng)

        terms, sums = micro_gradients(loss, state.params, batch, rng)
        params, opt_state, outcome = accumulate(state.params, state.opt_state, terms, sums["loss"], inputs)
        return _advance(state, params, opt_state, outcome), sums | _as_metrics(outcome)

    return train_step


def make_fused_step(
    sum_update: Callable[[Params, Batch, ArrayLike, Array, Params], tuple[Terms, Metrics]],
    optimizer: Optimizer,
) -> TrainStep:
    """`fused_step(state, batches, inputs) -> (state, metrics)`: k micro-steps and the end of the update, in one call.

    sum_update  made by `fused.make_update_sums`
    batches     a Batch whose fields have a leading dimension K, of which the first k = inputs.steps count
    metrics     those of `make_train_step`, float32 [K] each; the fields of `Outcome` are in element k - 1
    """

    def fused_step(state: TrainState, batches: Batch, inputs: UpdateInputs) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.update)
        terms, sums = sum_update(state.params, batches, inputs.steps, rng, state.frozen)
        params, opt_state, outcome = close_update(
            optimizer, state.params, state.opt_state, terms, jnp.sum(sums["loss"]), inputs
        )
        last = jnp.arange(batches.index.shape[0]) == inputs.steps - 1
        outcome_K = {name: jnp.where(last, value, 0.0) for name, value in _as_metrics(outcome).items()}
        return _advance(state, params, opt_state, outcome), sums | outcome_K

    return fused_step


def _advance(state: TrainState, params: Params, opt_state: object, outcome: Outcome) -> TrainState:
    update = state.update + outcome.is_update.astype(jnp.int32)
    return dataclasses.replace(state, params=params, opt_state=opt_state, update=update)


def _as_metrics(outcome: Outcome) -> Metrics:
    fields = dataclasses.fields(outcome)
    return {field.name: getattr(outcome, field.name).astype(jnp.float32) for field in fields}


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Batch], LossSums]:
    """`eval_step(params, batch) -> LossSums`, without dropout. Add the sums of all batches before dividing once.

    `loss_fn` is the loss that evaluation reports, without the terms that only training has. `params` must come from
    `Engine.eval_params`.
    """
    return lambda params, batch: loss_fn(params, batch, None)
