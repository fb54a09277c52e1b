"""What the engines of gradient accumulation share: the inputs of an update, its state, its arithmetic, its outcome.

A mean of micro-batch means would weigh a target in a nearly empty micro-batch more than one in a full micro-batch. An
update therefore sums the gradients of loss *sums*, and their weights, in float32, and divides once by the total weight,
before clipping. So k micro-steps give the update of one big batch.

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
    """What the host decides about an update before it begins. The step gets these numbers as traced scalars.

    steps       int32, the micro-steps of the update; only the first micro-step reads it
    hyper       float32, the optimizer's hyperparameters
    loss_limit  float32: an update with a larger mean loss is not applied
    norm_limit  float32: an update with a larger gradient norm is not applied
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
    applied    bool [], parameters and optimizer state were changed. They are not where no target had a weight, where
               the gradient norm is not finite, or where a limit was exceeded
    mean_loss  float32 [], the main term's loss divided by its weight
    grad_norm  float32 [], the norm of the divided gradient, before clipping
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
    """An update under way, as the train state holds it. The engines in_place and multisteps share this form, so that
    each can go on with an update that the other began.

    steps  int32 [], the micro-steps k of this update. k may change from update to update, never within one
    multi  the state of `optax.MultiSteps`: `mini_step` counts micro-steps, `gradient_step` counts updates, `acc_grads`
           holds the sums so far, {"terms", "loss"}, and `inner_opt_state` is the optimizer's own state
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
    """Runs the optimizer on the sums of a finished update.

    update  the method of an `Optimizer`
    terms   the gradient sums of each loss term
    loss    float32 [], the loss sum of the main term

    Returns the amounts to add to `params`, the new optimizer state, and the outcome. Where the update is not applied,
    the optimizer state is returned bitwise unchanged and the amounts are meaningless: use `applied_to`.
    """
    grads, weight = mean_gradient(terms), total_weight(terms)
    norm = optax.tree.norm(grads)
    main = terms[MAIN]
    mean_loss = loss / jnp.where(main.weight > 0, main.weight, 1.0)
    # With a single term, the norm of the sum follows from the norm of the mean, without another pass over it.
    square_total = (norm * weight) ** 2 if len(terms) == 1 else optax.tree.norm(main.grads, squared=True)
    # Finite gradients can be so large that their norm overflows. Clipping, which divides by the norm, cannot help then.
    applied = (
        (weight > 0) & jnp.isfinite(norm) & (mean_loss <= inputs.loss_limit) & (norm <= inputs.norm_limit)
    )
    updates, new_state = update(grads, opt_state, params, inputs.hyper)
    # A select and not a product with 0 or 1: 0 x inf is not a number.
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
    """The new parameters and optimizer state of a finished update, and its outcome, see `update_from_sums`."""
    # An offloaded state lies in the host's memory between updates, and the arithmetic wants it on the device.
    opt_state = to_device(opt_state) if optimizer.offload else opt_state
    arrays = params, opt_state, terms, loss, inputs
    updates, opt_state, outcome = update_from_sums(optimizer.update, *arrays)
    params = applied_to(params, updates, outcome.applied)
    return params, to_host(opt_state) if optimizer.offload else opt_state, outcome
