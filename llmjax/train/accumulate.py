"""Gradient accumulation: the batch arithmetic, and `optax.MultiSteps` made token-exact; known here only.

A mean of micro-batch means weighs a target in a nearly empty micro-batch more than one in a full micro-batch.
So what is accumulated here are gradients of loss *sums*, together with the loss weight, in float32; one
division by the total weight follows, before clipping and everything else, and k micro-batches give the update
of one big batch.

The optimizer runs on the last micro-step of a window only: `optax.MultiSteps` alone would run it on every
micro-step and throw the result away.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llmjax.errors import UserError
from llmjax.train.optimizer import Optimizer, OptState
from llmjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """How one update is cut: micro_batch_size x accumulation_steps sequences of seq_len tokens."""

    seq_len: int
    micro_batch_size: int
    accumulation_steps: int

    @property
    def sequences_per_update(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    @property
    def tokens_per_update(self) -> int:
        return self.sequences_per_update * self.seq_len

    def describe(self) -> str:
        """For example `8 sequences x 512 tokens x 2 micro-steps = 8,192 tokens per update`."""
        steps = f"{self.accumulation_steps} micro-step{'s' if self.accumulation_steps > 1 else ''}"
        sequences = f"{self.micro_batch_size} sequence{'s' if self.micro_batch_size > 1 else ''}"
        return (
            f"{sequences} x {self.seq_len:,} tokens x {steps} = {self.tokens_per_update:,} tokens per update"
        )


def resolve_batch(
    tokens_per_update: int, seq_len: int, micro_batch_size: int, accumulation_steps: int, data_shards: int = 1
) -> BatchArithmetic:
    """The cut of an update, where a micro_batch_size or accumulation_steps of 0 follows from the other.

    Both 0 means one micro-step. `data_shards` is mesh.data x mesh.fsdp, over which a micro-batch is split.
    UserError where the product does not come out.
    """
    given = {
        "train.tokens_per_update": (tokens_per_update, 1),
        "data.seq_len": (seq_len, 1),
        "train.micro_batch_size": (micro_batch_size, 0),
        "train.accumulation_steps": (accumulation_steps, 0),
    }
    for key, (value, least) in given.items():
        if value < least:
            raise UserError(f"{key}={value} is not {least} or more; give it a larger value")
    sequences, rest = divmod(tokens_per_update, seq_len)
    if rest:
        near = max(sequences, 1) * seq_len
        raise UserError(
            f"train.tokens_per_update={tokens_per_update} is not a multiple of data.seq_len={seq_len}; "
            f"use for example {near}"
        )
    cut = f"train.tokens_per_update={tokens_per_update} / data.seq_len={seq_len}"
    if micro_batch_size and accumulation_steps and micro_batch_size * accumulation_steps != sequences:
        product = micro_batch_size * accumulation_steps
        raise UserError(
            f"train.micro_batch_size={micro_batch_size} x train.accumulation_steps={accumulation_steps} "
            f"makes {product} sequences, but {cut} makes {sequences}; "
            f"set one of the two to 0 or train.tokens_per_update={product * seq_len}"
        )
    for key, value in (("micro_batch_size", micro_batch_size), ("accumulation_steps", accumulation_steps)):
        if value and sequences % value:
            raise UserError(
                f"train.{key}={value} does not divide the {sequences} sequences of an update ({cut}); "
                "use a divisor"
            )
    steps = accumulation_steps or (sequences // micro_batch_size if micro_batch_size else 1)
    size = sequences // steps
    if size % data_shards:
        raise UserError(
            f"train.micro_batch_size={size} is not divisible by the {data_shards} shards of the batch "
            f"(mesh.data x mesh.fsdp); change it, train.tokens_per_update={tokens_per_update}, "
            f"train.accumulation_steps={steps} or the mesh"
        )
    return BatchArithmetic(seq_len, size, steps)


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """An optimizer that takes gradient sums, `steps` of them to an update.

    Its state is the optimizer's own for `steps` == 1 and an `optax.MultiStepsState` around it otherwise.
    Between updates only the optimizer's own means anything: `canonical` gives it, and `restore` takes it up
    again with any other `steps`, so that a checkpoint never says how its batches were cut.
    """

    optimizer: Optimizer
    steps: int

    def init(self, params: Params) -> OptState:
        return self.restore(self.optimizer.init(params), params, jnp.zeros([], jnp.int32))

    def restore(self, opt_state: OptState, params: Params, update: Array) -> OptState:
        """The state at the start of update `update`, its window empty, from the optimizer's own state."""
        if self.steps == 1:
            return opt_state
        empty = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), _with_weight(params, 0.0))
        return optax.MultiStepsState(jnp.zeros([], jnp.int32), update, opt_state, empty)

    def canonical(self, state: OptState) -> OptState:
        """The optimizer's own state, all there is to save between two updates."""
        return state if self.steps == 1 else state.inner_opt_state

    def eval_params(self, state: OptState, params: Params) -> Params:
        """The parameters to evaluate and to generate with."""
        return self.optimizer.eval_params(self.canonical(state), params)

    def micro_step(
        self, params: Params, state: OptState, grads: Params, weight: Array
    ) -> tuple[Params, OptState, Array, Array]:
        """Take the gradient of a loss sum and the weight of it; on the last micro-step of a window, update.

        Returns (params, state, is_update bool [], grad_norm float32 []): the norm is that of the divided
        gradient before clipping, and 0 where `is_update` is False. A window of total weight 0 has gradient 0.
        """
        sums = jax.tree.map(lambda g: g.astype(jnp.float32), _with_weight(grads, weight))
        if self.steps == 1:
            grad_norm = optax.tree.norm(_divide(sums))
            updates, state = self._divided().update(sums, state, _with_weight(params, 0.0))
            return optax.apply_updates(params, updates["params"]), state, jnp.array(True), grad_norm

        empty = jax.tree.map(jnp.zeros_like, state.acc_grads)
        multi = optax.MultiSteps(self._divided(), self.steps, use_grad_mean=False)

        def close(_: Array, carry: tuple[Params, OptState, Array]) -> tuple[Params, OptState, Array]:
            params, state, _ = carry
            total = state.acc_grads
            # A constant count lets the compiler drop what MultiSteps selects between emitting and not.
            last = state._replace(mini_step=jnp.array(self.steps - 1), acc_grads=empty)
            updates, state = multi.update(total, last, _with_weight(params, 0.0))
            # MultiSteps multiplies the sums by 0, which would keep an infinite gradient as NaN.
            state = state._replace(acc_grads=empty)
            return optax.apply_updates(params, updates["params"]), state, optax.tree.norm(_divide(total))

        is_update = state.mini_step == self.steps - 1
        count = jnp.where(is_update, state.mini_step, state.mini_step + 1)
        state = state._replace(mini_step=count, acc_grads=jax.tree.map(jnp.add, state.acc_grads, sums))
        # A loop of no or one turn: XLA changes its state in place, but copies what a conditional keeps.
        carry = (params, state, jnp.zeros([], jnp.float32))
        params, state, grad_norm = jax.lax.fori_loop(0, is_update.astype(jnp.int32), close, carry)
        return params, state, is_update, grad_norm

    def _divided(self) -> optax.GradientTransformation:
        """The optimizer, fed `{params, weight}` of sums and dividing them first."""

        def update(updates: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
            new_updates, state = self.optimizer.update(_divide(updates), state, params["params"])
            return _with_weight(new_updates, 0.0), state

        return optax.GradientTransformation(lambda params: self.optimizer.init(params["params"]), update)


def _with_weight(params: Params, weight: Array | float) -> dict[str, Params]:
    return {"params": params, "weight": jnp.asarray(weight, jnp.float32)}


def _divide(sums: dict[str, Params]) -> Params:
    weight = sums["weight"]
    divisor = jnp.where(weight > 0, weight, 1.0)
    return jax.tree.map(lambda g: jnp.where(weight > 0, g / divisor, 0.0), sums["params"])
