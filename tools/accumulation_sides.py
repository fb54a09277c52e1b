"""The sides that `bench_accumulation.py` compares: our engines of accumulation without a model, and stock optax."""

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

# Micro-steps of an update.
STEPS = 8
STOCK = "optax.MultiSteps(optax.adamw)"
BASE, _ = load_config({})
OPTIMIZER = dataclasses.replace(BASE.optimizer, name="adamw", clip_norm=0.0)


@jax.custom_vjp
def given(params: Params, grads: Params) -> Array:
    """A loss without a value whose gradient is `grads`."""
    return jnp.zeros([])


given.defvjp(
    lambda params, grads: (jnp.zeros([]), grads),
    lambda grads, seed: (jax.tree.map(lambda g: seed * g, grads), None),
)


@dataclasses.dataclass(frozen=True)
class Engines:
    """The three ways to accumulate, without a model. The gradients of `fused` are made of its parameters."""

    params: Params
    mesh: Mesh

    @property
    def roles(self) -> Roles:
        return Roles(jax.tree.map(lambda _: ("embed", "mlp"), self.params))

    @property
    def optimizer(self) -> Optimizer:
        return make_optimizer(OPTIMIZER, BASE.optimizers, 100, self.roles)

    def order(self) -> UpdateInputs:
        hyper = self.optimizer.hyperparameters(0.0, 1.0)
        limit = jnp.float32(jnp.inf)
        return UpdateInputs(jnp.int32(STEPS), jax.tree.map(jnp.float32, hyper), limit, limit)

    def batch(self, *lead: int) -> Batch:
        rows, index = jnp.ones((*lead, 1, 8)), jnp.zeros((*lead, 1), jnp.int32)
        ones = rows.astype(jnp.int32)
        return Batch(ones, ones, rows, ones, ones, index)

    def state(self, engine: str) -> TrainState:
        accumulator = ENGINES[engine](self.optimizer, STEPS)
        params = jax.tree.map(jnp.copy, self.params)
        return TrainState(params, accumulator.init(params), jnp.zeros([], jnp.int32), jax.random.key(0))

    def micro_step(
        self, engine: str, state: TrainState, batch: Batch, order: UpdateInputs, grads: Params
    ) -> TrainState:
        def loss(params: Params, batch: Batch, rng: Array) -> LossSums:
            return LossSums(given(params, grads), jnp.sum(batch.weights), {})

        accumulate = ENGINES[engine](self.optimizer, STEPS).micro_step
        return make_train_step(loss, accumulate)(state, batch, order)

    def fused(self, state: TrainState, batch: Batch, order: UpdateInputs) -> TrainState:
        def loss(params: Params, batch: Batch, rng: Array) -> LossSums:
            weight = jnp.sum(batch.weights)
            return LossSums(given(params, jax.tree.map(lambda p: weight * p, params)), weight, {})

        specs = jax.tree.map(lambda _: PartitionSpec(), self.params)
        sum_update = make_update_sums(
            loss, self.mesh, specs, self.roles, gather="update", compute_dtype="float32"
        )
        return make_fused_step(sum_update, self.optimizer)(state, batch, order)

    @staticmethod
    def stock() -> optax.MultiSteps:
        return optax.MultiSteps(
            optax.adamw(OPTIMIZER.learning_rate, weight_decay=OPTIMIZER.weight_decay), STEPS
        )


def stock_update(
    multi: optax.MultiSteps, params: Params, state: optax.MultiStepsState, grads: Params
) -> tuple[Params, optax.MultiStepsState]:
    updates, state = multi.update(grads, state, params)
    return optax.apply_updates(params, updates), state
