"""The sides that `bench_accumulation.py` compares: our engines of gradient accumulation without a model, and optax."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from bench_train import load_config
from jax.sharding import Mesh, PartitionSpec

from llmjax.train.optim.optimizer import Optimizer, make_optimizer
from llmjax.train.optim.param_roles import Roles
from llmjax.train.update.accumulate import UpdateInputs
from llmjax.train.update.engines import ENGINES
from llmjax.train.update.fused import make_update_sums
from llmjax.train.update.state import TrainState
from llmjax.train.update.step import make_fused_step, make_train_step
from llmjax.types import Array, Batch, LossSums, Params

# The micro-steps of an update. A choice.
STEPS = 8
# The rival's name in the lines that are printed. "Stock" means that optax is used as it is.
STOCK = "optax.MultiSteps(optax.adamw)"
BASE, _ = load_config({})
# AdamW without clipping, which stock optax does not have either.
OPTIMIZER = dataclasses.replace(BASE.optimizer, name="adamw", clip_norm=0.0)


@jax.custom_vjp
def given(params: Params, grads: Params) -> Array:
    """A loss whose gradient is `grads`, so that the forward and backward pass take no time. Its value is 0."""
    return jnp.zeros([])


given.defvjp(
    lambda params, grads: (jnp.zeros([]), grads),
    lambda grads, seed: (jax.tree.map(lambda g: seed * g, grads), None),
)


@dataclasses.dataclass(frozen=True)
class Engines:
    """Our engines of gradient accumulation, without a model.

    params  the parameters, or their shapes if programs are only compiled
    mesh    the devices
    """

    params: Params
    mesh: Mesh

    @property
    def roles(self) -> Roles:
        """Every parameter is treated as a matrix of a feed-forward layer."""
        return Roles(jax.tree.map(lambda _: ("embed", "mlp"), self.params))

    @property
    def optimizer(self) -> Optimizer:
        """AdamW as in configs/base.py, for a run of 100 updates."""
        return make_optimizer(OPTIMIZER, BASE.optimizers, 100, self.roles)

    def order(self) -> UpdateInputs:
        """The inputs of an update of `STEPS` micro-steps, without limits."""
        hyper = self.optimizer.hyperparameters(0.0, 1.0)
        limit = jnp.float32(jnp.inf)
        return UpdateInputs(jnp.int32(STEPS), jax.tree.map(jnp.float32, hyper), limit, limit)

    def batch(self, *lead: int) -> Batch:
        """A micro-batch of one row of 8 positions, with the dimensions `lead` before its own."""
        rows, index = jnp.ones((*lead, 1, 8)), jnp.zeros((*lead, 1), jnp.int32)
        ones = rows.astype(jnp.int32)
        return Batch(ones, ones, rows, ones, ones, index)

    def state(self, engine: str) -> TrainState:
        """The state of a train step before the first update."""
        accumulator = ENGINES[engine](self.optimizer, STEPS)
        params = jax.tree.map(jnp.copy, self.params)
        return TrainState(params, accumulator.init(params), jnp.zeros([], jnp.int32), jax.random.key(0))

    def micro_step(
        self, engine: str, state: TrainState, batch: Batch, order: UpdateInputs, grads: Params
    ) -> TrainState:
        """One micro-step of `in_place` or `multisteps` with the gradients `grads`."""

        def loss(params: Params, batch: Batch, rng: Array) -> LossSums:
            return LossSums(given(params, grads), jnp.sum(batch.weights), {})

        accumulate = ENGINES[engine](self.optimizer, STEPS).micro_step
        return make_train_step(loss, accumulate)(state, batch, order)

    def fused(self, state: TrainState, batch: Batch, order: UpdateInputs) -> TrainState:
        """One update of `fused`, whose gradients are the parameters times the weight of a micro-batch.

        The compiler could move gradients that do not depend on the micro-batch out of the loop.
        """

        def loss(params: Params, batch: Batch, rng: Array) -> LossSums:
            weight = jnp.sum(batch.weights)
            return LossSums(given(params, jax.tree.map(lambda p: weight * p, params)), weight, {})

        # Every device has all parameters.
        specs = jax.tree.map(lambda _: PartitionSpec(), self.params)
        sum_update = make_update_sums(
            loss, self.mesh, specs, self.roles, gather="update", compute_dtype="float32"
        )
        return make_fused_step(sum_update, self.optimizer)(state, batch, order)

    @staticmethod
    def stock() -> optax.MultiSteps:
        """The rival: gradient accumulation and AdamW of optax, with the same hyperparameters."""
        return optax.MultiSteps(
            optax.adamw(OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay), STEPS
        )


def stock_update(
    multi: optax.MultiSteps, params: Params, state: optax.MultiStepsState, grads: Params
) -> tuple[Params, optax.MultiStepsState]:
    """One micro-step of stock optax with the gradients `grads`: the new parameters and the new state."""
    updates, state = multi.update(grads, state, params)
    return optax.apply_updates(params, updates), state
