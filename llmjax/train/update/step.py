"""The compiled steps of training and evaluation: pure functions for `build` to jit.

Model, task and optimizer are closed over; nothing here waits for the device, and a step compiles once for a
whole run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.train.optim.optimizer import Optimizer
from llmjax.train.update.accumulate import Accumulator, Closing, Order, close_update
from llmjax.train.update.gradients import LossFn, Terms, micro_gradients
from llmjax.train.update.state import TrainState
from llmjax.types import Array, Batch, LossSums, Params

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, Order], tuple[TrainState, Metrics]]


def make_train_step(loss_fn: LossFn, accumulator: Accumulator) -> TrainStep:
    """`train_step(state, batch, order) -> (state, metrics)`, one micro-step; jit it with `state` donated.

    On a mesh also give jit the shardings of the state as `out_shardings`: left free, the compiler changes
    some of them, and the next call compiles anew.

    All micro-steps of an update share one random key, fold_in(state.rng, state.update): `loss_fn` must draw
    each sequence's randomness from that key and `batch.index`, so that it does not depend on how the batch
    was cut.

    metrics, all float32 []: the sums of `micro_gradients`, and
      is_update, applied, mean_loss, grad_norm, square_total: of the update, see `Closing`; 0 on micro-steps
      that do not end one
    """

    def train_step(state: TrainState, batch: Batch, order: Order) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.update)
        terms, sums = micro_gradients(loss_fn, state.params, batch, rng)
        params, opt_state, closing = accumulator.micro_step(
            state.params, state.opt_state, terms, sums["loss"], order
        )
        return _advance(state, params, opt_state, closing), sums | _as_metrics(closing)

    return train_step


def make_fused_step(
    window: Callable[[Params, Batch, Array, Array], tuple[Terms, Metrics]], optimizer: Optimizer
) -> TrainStep:
    """`fused_step(state, batches, order) -> (state, metrics)`: the order's k micro-steps and the update, in one call.

    `window` is that of `fused.make_window`; `batches` is a Batch whose fields have a leading dimension K, of which
    the first k count. metrics as those of `make_train_step`, float32 [K] each, the update's in element k - 1.
    """

    def fused_step(state: TrainState, batches: Batch, order: Order) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.update)
        terms, sums = window(state.params, batches, order.steps, rng)
        params, opt_state, closing = close_update(
            optimizer, state.params, state.opt_state, terms, jnp.sum(sums["loss"]), order
        )
        last = jnp.arange(batches.index.shape[0]) == order.steps - 1
        closing_K = {name: jnp.where(last, value, 0.0) for name, value in _as_metrics(closing).items()}
        return _advance(state, params, opt_state, closing), sums | closing_K

    return fused_step


def _advance(state: TrainState, params: Params, opt_state: object, closing: Closing) -> TrainState:
    update = state.update + closing.is_update.astype(jnp.int32)
    return dataclasses.replace(state, params=params, opt_state=opt_state, update=update)


def _as_metrics(closing: Closing) -> Metrics:
    fields = dataclasses.fields(closing)
    return {field.name: getattr(closing, field.name).astype(jnp.float32) for field in fields}


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Batch], LossSums]:
    """`eval_step(params, batch) -> LossSums`, without dropout; add the sums of all batches, then divide once.

    `loss_fn` is the loss that evaluation reports, without the terms that only training has. `params` are those of
    `Accumulator.eval_params`.
    """
    return lambda params, batch: loss_fn(params, batch, None)
