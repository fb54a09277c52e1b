"""Moments of the gradient whose decay may change from update to update, with their bias corrected for that.

A moment begins at zero and is divided by the sum of the weights that it gives to the gradients so far, which is
1 - the product of all decays so far. optax computes that product as decay ** count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmjax.types import Array, Params

OptState = Any


class AdamState(NamedTuple):
    """Moments, and the sum of the weights that each gives to the gradients so far: 1 - beta ** n at a constant beta."""

    mu: Params
    nu: Params
    mu_weight: Array
    nu_weight: Array


def scale_by_adam(beta1: Array | float, beta2: Array | float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) with the decays of this update.

    optax's own corrects the bias by beta ** n, which supposes that beta never changes.
    """

    def init(params: Params) -> AdamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731 - two, not one twice: they are donated
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
    """Makes optax's `inner`, which corrects the bias of its moment by 1 - decay ** count, right for a changing decay.

    `decay` belongs to this update and `unit` to an update of train.tokens_per_update tokens; both are 0 or more and
    below 1. The state keeps as its `count`, float32, which power of `unit` is the product of all decays so far.
    `inner` is shown which power of `decay` that is. Where the decay never changes, both are exactly the number of
    updates.
    """

    def log(x: Array | float) -> Array:
        # The power of a very large update may round to 0, of which there is no logarithm.
        return jnp.log(jnp.maximum(jnp.asarray(x, jnp.float32), jnp.finfo(jnp.float32).tiny))

    def init(params: Params) -> OptState:
        state = inner.init(params)
        return state._replace(count=jnp.asarray(state.count, jnp.float32))

    def update(grads: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        power = jnp.where(jnp.asarray(decay, jnp.float32) == np.float32(unit), 1.0, log(decay) / log(unit))
        count = state.count + power
        updates, new_state = inner.update(grads, state._replace(count=count / power - 1.0), params)
        return updates, new_state._replace(count=count)

    return optax.GradientTransformation(init, update)
