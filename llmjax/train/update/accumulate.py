"""What the engines of gradient accumulation share: an update's numbers, the state within it, and its arithmetic.

A mean of micro-batch means weighs a target in a nearly empty micro-batch more than one in a full micro-batch.
So an update accumulates the gradients of loss *sums*, together with their weights, in float32. One division by
the total weight follows, before clipping and everything else, and k micro-steps give the update of one big batch.

There are three engines. `multisteps.py` is the plain reference: `optax.MultiSteps` does the accumulating.
`in_place.py` does the same arithmetic with less memory traffic. `fused.py` runs all micro-steps of an update in one
compiled call. All of them end in `update_from_sums`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from llmjax.train.optim.offload import to_device, to_host
from llmjax.train.optim.optimizer import Hyperparameters, Optimizer, OptState
from llmjax.train.update.gradients import MAIN, Terms, mean_gradient, total_weight
from llmjax.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateInputs:
    """What the host decides about an update before it begins: numbers on the host, scalars in the step.

    steps       int32, micro-steps of the update; heeded by the first of them only
    hyper       the optimizer's hyperparameters
    loss_limit, norm_limit  float32: an update whose mean loss or gradient norm is above is not applied
    """

    steps: ArrayLike
    hyper: Hyperparameters
    loss_limit: ArrayLike
    norm_limit: ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an update ended; all 0 before its last micro-step.

    is_update  bool [], the update has ended
    applied    bool [], and parameters and optimizer have moved. Not so where nothing had any weight, where the norm
               of the gradient is not finite, or beyond a limit
    mean_loss  float32 [], of the main term
    grad_norm  float32 [], of the divided gradient, before clipping
    square_total  float32 [], squared norm of the main term's summed gradient, for the gradient noise scale
    """

    is_update: Array
    applied: Array
    mean_loss: Array
    grad_norm: Array
    square_total: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartialUpdate:
    """An update under way. Both engines that sum over several calls keep it in the state of `optax.MultiSteps`, so
    that either goes on with an update that the other began.

    steps  int32 [], k of the update under way: k may change from update to update, never within one
    multi  mini_step counts micro-steps, gradient_step updates; acc_grads holds the sums so far, {"terms", "loss"}
    """

    steps: Array
    multi: optax.MultiStepsState


def update_from_sums(
    update: Callable[..., tuple[Params, OptState]],
    params: Params,
    opt_state: OptState,
    terms: Terms,
    loss: Array,
    inputs: UpdateInputs,
) -> tuple[Params, OptState, Outcome]:
    """What a finished update changes: the amounts to add to `params`, the new optimizer state, and how it closed.

    `update` is the `Optimizer`'s. `terms` are the gradient sums and `loss` is the loss sum of the main term. Where the
    update is not applied, the optimizer state comes back bitwise as it was and the amounts mean nothing: `applied_to`
    leaves them out.
    """
    grads, weight = mean_gradient(terms), total_weight(terms)
    norm = optax.tree.norm(grads)
    main = terms[MAIN]
    mean_loss = loss / jnp.where(main.weight > 0, main.weight, 1.0)
    square_total = (norm * weight) ** 2 if len(terms) == 1 else optax.tree.norm(main.grads, squared=True)
    # Finite gradients can be so large that their norm is not: no clipping brings those back.
    applied = (
        (weight > 0) & jnp.isfinite(norm) & (mean_loss <= inputs.loss_limit) & (norm <= inputs.norm_limit)
    )
    updates, new_state = update(grads, opt_state, params, inputs.hyper)
    opt_state = select(applied, new_state, opt_state)
    return updates, opt_state, Outcome(jnp.array(True), applied, mean_loss, norm, square_total)


def applied_to(params: Params, updates: Params, applied: Array) -> Params:
    """`params` with `updates` added, or bitwise as they were where `applied` is false."""
    return select(applied, optax.apply_updates(params, updates), params)


def select(condition: Array, new: Any, old: Any) -> Any:
    """The tree `new` where the bool [] `condition` holds, the tree `old` elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def close_update(
    optimizer: Optimizer, params: Params, opt_state: OptState, terms: Terms, loss: Array, inputs: UpdateInputs
) -> tuple[Params, OptState, Outcome]:
    """The new parameters and optimizer state of a finished update, and how it closed, see `update_from_sums`."""
    opt_state = to_device(opt_state) if optimizer.offload else opt_state
    arrays = params, opt_state, terms, loss, inputs
    updates, opt_state, outcome = update_from_sums(optimizer.update, *arrays)
    params = applied_to(params, updates, outcome.applied)
    return params, to_host(opt_state) if optimizer.offload else opt_state, outcome
