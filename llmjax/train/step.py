"""One micro-step of training, and one of evaluation: pure functions for `build` to jit.

Model, task and optimizer are closed over; nothing here waits for the device, and a step compiles once for a
whole run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.train.accumulate import Accumulator
from llmjax.train.state import TrainState
from llmjax.types import Array, Batch, LossSums, Params

LossFn = Callable[[Params, Batch, Array | None], LossSums]  # (params, batch, rng); rng None: no dropout
Metrics = dict[str, Array]


def make_train_step(
    loss_fn: LossFn, accumulator: Accumulator
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step(state, batch) -> (state, metrics)`, one micro-step; jit it with `state` donated.

    On a mesh also give jit the shardings of the state as `out_shardings`: left free, the compiler changes
    some of them, and the next call compiles anew.

    All micro-steps of an update share one random key, fold_in(state.rng, state.update): `loss_fn` must draw
    each sequence's randomness from that key and `batch.index`, so that it does not depend on how the batch
    was cut.

    metrics, all float32 []:
      loss, weight   sums over this micro-batch, as are the task's own
      grad_norm      of the update's gradient, divided, before clipping; 0 on micro-steps that do not update
      learning_rate  of the current update
      is_update      1 on the micro-step that ends an update, else 0
      nonfinite      1 where the loss, or on an update the gradient norm, is not finite, else 0
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.update)

        def loss(params: Params) -> tuple[Array, LossSums]:
            sums = loss_fn(params, batch, rng)
            return sums.loss, sums

        grads, sums = jax.grad(loss, has_aux=True)(state.params)
        params, opt_state, is_update, grad_norm = accumulator.micro_step(
            state.params, state.opt_state, grads, sums.weight
        )
        metrics = {
            **sums.metrics,
            "loss": sums.loss,
            "weight": sums.weight,
            "grad_norm": grad_norm,
            "learning_rate": accumulator.optimizer.learning_rate(state.update),
            "is_update": is_update,
            "nonfinite": ~(jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)),
        }
        state = dataclasses.replace(
            state, params=params, opt_state=opt_state, update=state.update + is_update.astype(jnp.int32)
        )
        return state, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    return train_step


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Batch], LossSums]:
    """`eval_step(params, batch) -> LossSums`, deterministic; add the sums of all batches, then divide once.

    `params` are those of `Accumulator.eval_params`.
    """
    return lambda params, batch: loss_fn(params, batch, None)
