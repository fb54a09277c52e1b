"""Gradient accumulation by `optax.MultiSteps`, made exact: the plain reference, and the only file that knows it.

`optax.MultiSteps` is told to add (`use_grad_mean=False`) and is fed sums: the gradient of every loss term's sum, the
term's weight, and the loss. The optimizer inside of it divides, once, by the total weight.

    multi = optax.MultiSteps(inner, every_k_schedule=k, use_grad_mean=False)
    updates, state = multi.update(sums, state, params)

A micro-step that is not finite is fed as zeros with weight zero, see `gradients.micro_gradients`. The parameter
`should_skip_update_fn` of `optax.MultiSteps` would not do: it does not count a micro-step that it skips, so the update
would take one micro-batch more than its k.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llmjax.train.optim.offload import to_device, to_host
from llmjax.train.optim.optimizer import OptState
from llmjax.train.update.accumulate import (
    Outcome,
    PartialUpdate,
    UpdateInputs,
    applied_to,
    select,
    update_from_sums,
)
from llmjax.train.update.engine import EachMicroStep
from llmjax.train.update.gradients import Terms
from llmjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class MultiSteps(EachMicroStep):
    """Runs the optimizer on every micro-step, as `optax.MultiSteps` does, and keeps only the result of the last."""

    @property
    def keeps_sums(self) -> bool:
        return True

    def micro_step(
        self, params: Params, state: OptState, terms: Terms, loss: Array, inputs: UpdateInputs
    ) -> tuple[Params, OptState, Outcome]:
        before, offload = state.multi, self.optimizer.offload
        steps = jnp.where(before.mini_step == 0, inputs.steps, state.steps).astype(jnp.int32)

        def update(sums: dict, own: OptState, params: Params) -> tuple[dict, OptState]:
            arrays = params, own, sums["terms"], sums["loss"], inputs
            updates, own, outcome = update_from_sums(self.optimizer.update, *arrays)
            numbers = jax.tree.map(lambda x: x.astype(jnp.float32), outcome)
            return {"params": updates, "outcome": numbers}, own

        inner = optax.GradientTransformation(self.optimizer.init, update)
        multi = optax.MultiSteps(inner, every_k_schedule=lambda _: steps, use_grad_mean=False)
        own = to_device(before.inner_opt_state) if offload else before.inner_opt_state
        updates, after = multi.update(
            {"terms": terms, "loss": loss}, before._replace(inner_opt_state=own), params
        )
        is_update = multi.has_updated(after)
        # MultiSteps multiplies discarded results by 0, and 0 x inf is not a number. Selecting is safe.
        empty = jax.tree.map(jnp.zeros_like, after.acc_grads)
        outcome = select(is_update, updates["outcome"], jax.tree.map(jnp.zeros_like, updates["outcome"]))
        outcome = dataclasses.replace(outcome, is_update=is_update, applied=outcome.applied > 0)
        after = after._replace(
            acc_grads=select(is_update, empty, after.acc_grads),
            inner_opt_state=to_host(after.inner_opt_state) if offload else after.inner_opt_state,
        )
        return applied_to(params, updates["params"], outcome.applied), PartialUpdate(steps, after), outcome
