"""Muon: momentum whose matrices are made orthogonal before they move the parameters (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from llmjax.train.optim.moments import OptState, follow_decay
from llmjax.train.optim.param_roles import Roles
from llmjax.types import Array, Params

# Jordan et al. 2024; Liu et al. 2025.
MUON_MOMENTUM = 0.95
# The root mean square of an update, the empirical figure of AdamW: Liu et al. 2025, equation 4.
MUON_RMS = 0.2


def scale_by_muon(momentum: Array | float, form: str, roles: Roles) -> optax.GradientTransformation:
    """The direction of a Muon update, for trees of matrices only, with the root mean square of AdamW's update.

    `momentum` is the decay of this update; `form` is one of `MUON_FORMS`. The momentum is Nesterov's. Newton and
    Schulz's iteration makes it orthogonal and takes away its scale, so that a form only decides how much the newest
    gradient counts against the older ones.

    debiased   as optax does it: the momentum and the newest gradient are each divided by the sum of the weights in
               them (Dozat 2016). The newest gradient counts more than in the reference while updates are few: 0.73
               of all in the second update instead of 0.68, and 0.39 in the fifth instead of 0.37. Of independent
               gradients the second and third update differ from those of the reference by about 16 % of their
               length, the tenth by 4 %, the fiftieth by less than 0.3 %.
    reference  as Jordan's code does it: m = 0.95 m + 0.05 g, beginning at zero, and then 0.95 m + 0.05 g.

    Both forms depart from Jordan's code in the scale of an update. There it is max(1, rows / columns) ** 0.5 times an
    orthogonal matrix and needs a learning rate of its own beside AdamW's. An orthogonal m x n matrix has root mean
    square 1 / sqrt(max(m, n)); times 0.2 sqrt(max(m, n)) it has that of AdamW's update, so that one learning rate and
    one decay serve all parameters (Liu et al. 2025). Jordan iterates in bfloat16, and this in float32.
    """

    def dimensions(params: Params) -> Params:
        return roles.map(lambda role, _: MuonDimensionNumbers(*role.sides), params)

    inner = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions)
    orthogonal = MUON_FORMS[form](inner, momentum)

    def update(grads: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        updates, state = orthogonal.update(grads, state, params)
        return jax.tree.map(_match_rms, updates, dimensions(updates)), state

    return optax.GradientTransformation(orthogonal.init, update)


def muon_labels(roles: Roles) -> Callable[[Params], Params]:
    """`muon` for the matrices inside the network and `adamw` for embeddings, the output head, norms and biases."""
    return lambda params: roles.map(lambda role, _: "muon" if role.is_hidden_matrix else "adamw", params)


def _match_rms(x: Array, numbers: MuonDimensionNumbers) -> Array:
    rows, columns = ([x.shape[axis] for axis in axes] for axes in numbers)
    return MUON_RMS * max(math.prod(rows), math.prod(columns)) ** 0.5 * x


def _debiased(inner: optax.GradientTransformation, momentum: Array | float) -> optax.GradientTransformation:
    return follow_decay(inner, momentum, MUON_MOMENTUM)


def _reference(inner: optax.GradientTransformation, momentum: Array | float) -> optax.GradientTransformation:
    """After infinitely many updates there is nothing left to correct, so that is the count which `inner` sees."""
    counted = _debiased(inner, momentum)

    def update(grads: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        endless = jnp.full_like(state.count, jnp.inf)
        updates, new_state = inner.update(grads, state._replace(count=endless), params)
        return updates, new_state._replace(count=state.count + 1)

    return optax.GradientTransformation(counted.init, update)


MUON_FORMS: dict[
    str, Callable[[optax.GradientTransformation, Array | float], optax.GradientTransformation]
] = {"debiased": _debiased, "reference": _reference}
