"""Gradient accumulation that adds each micro-step's sums in place and runs the optimizer once an update.

`optax.MultiSteps` runs the optimizer on every micro-step, discards the result except on the last, and writes every
array of its state each time. This engine only adds to the sums until the last micro-step. It does the same arithmetic
in the same order as `multisteps.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.train.optim.optimizer import OptState
from llmjax.train.update.accumulate import Outcome, PartialUpdate, UpdateInputs, close_update
from llmjax.train.update.engine import EachMicroStep
from llmjax.train.update.gradients import Terms, add_terms
from llmjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class InPlace(EachMicroStep):
    """Adds sums in place. With `max_steps` = 1 there is nothing to add, and the state is the optimizer's own."""

    @property
    def keeps_sums(self) -> bool:
        return self.max_steps > 1

    def micro_step(
        self, params: Params, state: OptState, terms: Terms, loss: Array, inputs: UpdateInputs
    ) -> tuple[Params, OptState, Outcome]:
        if not self.keeps_sums:
            return close_update(self.optimizer, params, state, terms, loss, inputs)
        multi, before = state.multi, state.multi.acc_grads
        steps = jnp.where(multi.mini_step == 0, inputs.steps, state.steps).astype(jnp.int32)
        sums = {"terms": add_terms(before["terms"], terms), "loss": before["loss"] + loss}
        mini_step = multi.mini_step + 1
        is_update = mini_step >= steps
        zero = jnp.zeros([], jnp.float32)

        def close(_: Array, carry: tuple) -> tuple:
            params, own, sums, _ = carry
            params, own, outcome = close_update(
                self.optimizer, params, own, sums["terms"], sums["loss"], inputs
            )
            return params, own, jax.tree.map(jnp.zeros_like, sums), outcome

        # A loop of 0 or 1 rounds in the place of a conditional: XLA updates the carry of a loop in place, but copies
        # what a conditional passes through.
        carry = params, multi.inner_opt_state, sums, Outcome(is_update, jnp.array(False), zero, zero, zero)
        rounds = is_update.astype(jnp.int32)
        params, own, sums, outcome = jax.lax.fori_loop(0, rounds, close, carry)
        multi = multi._replace(
            mini_step=jnp.where(is_update, 0, mini_step),
            gradient_step=multi.gradient_step + rounds,
            inner_opt_state=own,
            acc_grads=sums,
        )
        return params, PartialUpdate(steps, multi), outcome
