"""Moments of the gradient (running means) whose decay may change from update to update, without a bias towards zero.

A moment begins at zero. To take the bias away, it is divided by the sum of the weights that it gives to the gradients
so far, which is 1 - the product of all decays so far. optax computes this product as decay ** count, which is only
right for a decay that never changes. Decays change where the batch grows and optimizer.constant_in is `tokens`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmjax.types import Array, Params

# The state of an optax transformation: a tree of arrays.
OptState = Any


class AdamState(NamedTuple):
    """The first moment `mu` and the second moment `nu`, which are like the parameters.

    `mu_weight` and `nu_weight`, float32 [], are the sums of the weights that the moments give to the gradients so far:
    1 - beta ** n after n updates with the same beta.
    """

    mu: Params
    nu: Params
    mu_weight: Array
    nu_weight: Array


def scale_by_adam(beta1: Array | float, beta2: Array | float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015), where `beta1` and `beta2` are the decays of this update."""

    def init(params: Params) -> AdamState:
        # Each moment needs arrays of its own, since the compiled step donates all of them.
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return AdamState(zeros(), zeros(), jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))

    def update(grads: Params, state: AdamState, params: Params) -> tuple[Params, AdamState]:
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, grads)
        w1, w2 = beta1 * state.mu_weight + (1 - beta1), beta2 * state.nu_weight + (1 - beta2)
        updates = jax.tree.map(lambda m, v: (m / w1) / (jnp.sqrt(v / w2) + eps), mu, nu)
        return updates, AdamState(mu, nu, w1, w2)

    return optax.GradientTransformation(init, update)


def follow_decay(
    inner: optax.GradientTransformation, decay: Array | float, unit: float
) -> optax.GradientTransformation:
    """Corrects the bias of a moment in optax's transformation `inner` for a decay that changes.

    `decay` is the decay of this update and `unit` the decay of an update of train.tokens_per_update tokens; both are at
    least 0 and less than 1. `inner` divides its moment by 1 - decay ** count. So it is shown the count for which
    decay ** count is the product of all decays so far. The `count` in the state (float32) is the exponent for which
    unit ** count is that product. While the decay is `unit`, both counts are exactly the number of updates.
    """

    def log(x: Array | float) -> Array:
        # The decay of a very large update may round to 0, which has no logarithm.
        return jnp.log(jnp.maximum(jnp.asarray(x, jnp.float32), jnp.finfo(jnp.float32).tiny))

    def init(params: Params) -> OptState:
        state = inner.init(params)
        return state._replace(count=jnp.asarray(state.count, jnp.float32))

    def update(grads: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        # decay = unit ** power. The comparison makes the power exactly 1, which a quotient of logarithms might miss.
        power = jnp.where(jnp.asarray(decay, jnp.float32) == np.float32(unit), 1.0, log(decay) / log(unit))
        count = state.count + power
        # `inner` adds 1 to the count before it uses it.
        updates, new_state = inner.update(grads, state._replace(count=count / power - 1.0), params)
        return updates, new_state._replace(count=count)

    return optax.GradientTransformation(init, update)
