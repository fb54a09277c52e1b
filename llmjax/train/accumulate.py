"""Gradient accumulation by `optax.MultiSteps`, made exact and cheap; known here only.

A mean of micro-batch means weighs a target in a nearly empty micro-batch more than one in a full micro-batch.
So what is accumulated here are gradients of loss *sums*, together with their weights, in float32; one division
by the total weight follows, before clipping and everything else, and k micro-steps give the update of one big
batch. `fused.py` does the same with all micro-steps in one compiled call; both end in `close_window`.

k may change from window to window without recompiling, never within one: the window's k is part of the state.
The optimizer runs on the last micro-step only: `optax.MultiSteps` alone would run it on every one and throw
the result away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llmjax.train.gradients import MAIN, Terms, add_terms, empty_terms, mean_gradient, total_weight
from llmjax.train.optimizer import Hyperparameters, Optimizer, OptState
from llmjax.train.stash import fetch, stash
from llmjax.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """What the host decides about an update before it begins: numbers on the host, scalars in the step.

    steps       int32, micro-steps of the window; heeded by its first micro-step only
    hyper       the optimizer's hyperparameters
    loss_limit, norm_limit  float32: an update whose mean loss or gradient norm is above is not applied
    """

    steps: Array | int
    hyper: Hyperparameters
    loss_limit: Array | float
    norm_limit: Array | float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Closing:
    """How a window ended; all 0 before its last micro-step.

    is_update  bool [], the window has ended
    applied    bool [], and parameters and optimizer have moved. Not so where nothing had any weight, or beyond a limit
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
class Window:
    """The accumulator's state within a run of several micro-steps per update.

    steps  int32 [], k of the window under way
    multi  mini_step counts its micro-steps, gradient_step updates; acc_grads holds the sums so far
    """

    steps: Array
    multi: optax.MultiStepsState


def close_window(
    update: Callable[..., tuple[Params, OptState]],
    params: Params,
    opt_state: OptState,
    terms: Terms,
    loss: Array,
    order: Order,
    *,
    offload: bool = False,
) -> tuple[Params, OptState, Closing]:
    """The update of a window from its sums: `loss`, of the main term, and the gradient terms.

    `update` is that of the `Optimizer`. An update that is not applied leaves parameters and optimizer state
    bitwise as they were. `offload`: the state comes from the host's memory and goes back there.
    """
    opt_state = fetch(opt_state) if offload else opt_state
    grads, weight = mean_gradient(terms), total_weight(terms)
    norm = optax.tree.norm(grads)
    main = terms[MAIN]
    mean_loss = loss / jnp.where(main.weight > 0, main.weight, 1.0)
    square_total = (norm * weight) ** 2 if len(terms) == 1 else optax.tree.norm(main.grads, squared=True)
    applied = (weight > 0) & (mean_loss <= order.loss_limit) & (norm <= order.norm_limit)
    updates, new_state = update(grads, opt_state, params, order.hyper)
    keep = lambda new, old: jnp.where(applied, new, old)  # noqa: E731
    params = jax.tree.map(keep, optax.apply_updates(params, updates), params)
    opt_state = jax.tree.map(keep, new_state, opt_state)
    return (
        params,
        stash(opt_state) if offload else opt_state,
        Closing(jnp.array(True), applied, mean_loss, norm, square_total),
    )


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """An optimizer that takes gradient sums, up to `max_steps` of them to an update.

    Its state is the optimizer's own for `max_steps` == 1 and a `Window` around it otherwise. Between updates only
    the optimizer's own means anything: `canonical` gives it, and `restore` takes it up again with any other
    `max_steps`, so that a checkpoint between updates never says how its batches were cut.

    terms  names of the loss terms with weights of their own, each of which is summed apart
    """

    optimizer: Optimizer
    max_steps: int
    terms: tuple[str, ...] = ()

    def init(self, params: Params) -> OptState:
        return self.restore(self.optimizer.init(params), params, jnp.zeros([], jnp.int32))

    def restore(self, opt_state: OptState, params: Params, update: Array) -> OptState:
        """The state at the start of update `update`, its window empty, from the optimizer's own state."""
        if self.max_steps == 1:
            return opt_state
        empty = {"terms": empty_terms(params, self.terms), "loss": jnp.zeros([], jnp.float32)}
        return Window(
            jnp.ones([], jnp.int32),
            optax.MultiStepsState(jnp.zeros([], jnp.int32), update, opt_state, empty),
        )

    def canonical(self, state: OptState) -> OptState:
        """The optimizer's own state, all there is to save between two updates."""
        return state if self.max_steps == 1 else state.multi.inner_opt_state

    def eval_params(self, state: OptState, params: Params) -> Params:
        """The parameters to evaluate and to generate with."""
        own = self.canonical(state)
        return self.optimizer.eval_params(fetch(own) if self.optimizer.offload else own, params)

    def micro_step(
        self, params: Params, state: OptState, terms: Terms, loss: Array, order: Order
    ) -> tuple[Params, OptState, Closing]:
        """Takes the sums of a micro-batch, finite all of them; on the last micro-step of a window, updates."""
        if self.max_steps == 1:
            update, offload = self.optimizer.update, self.optimizer.offload
            return close_window(update, params, state, terms, loss, order, offload=offload)
        multi, before = state.multi, state.multi.acc_grads
        steps = jnp.where(multi.mini_step == 0, order.steps, state.steps).astype(jnp.int32)
        sums = {"terms": add_terms(before["terms"], terms), "loss": before["loss"] + loss}
        multi = multi._replace(mini_step=multi.mini_step + 1, acc_grads=sums)
        is_update = multi.mini_step >= steps
        zero = jnp.zeros([], jnp.float32)
        # A loop of no or one turn: XLA changes its state in place, but copies what a conditional keeps.
        carry = (params, multi, Closing(is_update, jnp.array(False), zero, zero, zero))
        params, multi, closing = jax.lax.fori_loop(
            0, is_update.astype(jnp.int32), lambda _, carry: self._close(*carry[:2], order), carry
        )
        return params, Window(steps, multi), closing

    def _close(
        self, params: Params, multi: optax.MultiStepsState, order: Order
    ) -> tuple[Params, optax.MultiStepsState, Closing]:
        """The sums of a whole window go through `optax.MultiSteps` as a window of one micro-step."""

        def update(
            grads: Params, multi: optax.MultiStepsState, params: Params, hyper: Hyperparameters
        ) -> tuple[Params, optax.MultiStepsState]:
            inner = optax.GradientTransformation(
                self.optimizer.init,
                lambda grads, state, params: self.optimizer.update(grads, state, params, hyper),
            )
            start = multi._replace(acc_grads=jax.tree.map(jnp.zeros_like, grads))
            updates, multi = optax.MultiSteps(inner, 1, use_grad_mean=False).update(grads, start, params)
            return updates, multi._replace(acc_grads=None)

        sums, start = multi.acc_grads, multi._replace(mini_step=jnp.zeros([], jnp.int32), acc_grads=None)
        arrays = params, start, sums["terms"], sums["loss"], order
        params, multi, closing = close_window(update, *arrays, offload=self.optimizer.offload)
        return params, multi._replace(acc_grads=jax.tree.map(jnp.zeros_like, sums)), closing
