"""Adafactor's second moment, which holds rows and columns instead of matrices (Shazeer and Stern 2018)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.train.optim.param_roles import Role, Roles
from llmjax.types import Array, Params

# By which the decay of the second moment approaches 1: 1 - update ** -exponent.
EXPONENT = 0.8
# Added to the square of the gradient.
EPS = 1e-30


class AdafactorState(NamedTuple):
    """The second moment of the gradient as means over the columns and over the rows of each matrix.

    count    int32 [], updates so far
    rows     like the parameters, but of length 1 along the columns. Of what is no matrix, the whole second moment
    columns  like the parameters, but of length 1 along the rows. Of what is no matrix, 1 along every axis
    """

    count: Array  # type: ignore[assignment]  # hides a method of tuples
    rows: Params
    columns: Params


def scale_by_adafactor(largest_decay: Array | float, roles: Roles) -> optax.GradientTransformation:
    """Divides the gradient by the root of its second moment, whose decay is 0 at first and grows to `largest_decay`.

    The second moment of element (i, j) of a matrix is rows[i] * columns[j] / mean(rows). Which axes make the rows and
    the columns follows from the logical axes of a parameter, as for Muon; embeddings are matrices here too,
    and layers never are an axis of one. Scales and biases are vectors, a matrix of one column each, of which rows,
    columns and mean give the whole second moment back. The mean of the squares needs no correction of a bias, since
    the first decay is 0.
    """

    def init(params: Params) -> AdafactorState:
        def zeros(side: int) -> Params:
            return roles.map(lambda role, x: jnp.zeros_like(_mean(x, _sides(role)[side])), params)

        return AdafactorState(jnp.zeros([], jnp.int32), rows=zeros(1), columns=zeros(0))

    def update(
        grads: Params, state: AdafactorState, params: Params | None = None
    ) -> tuple[Params, AdafactorState]:
        decay = jnp.minimum(1.0 - (state.count + 1.0) ** -EXPONENT, largest_decay)

        def follow(old: Params, side: int) -> Params:
            means = roles.map(lambda role, g: _mean(g * g + EPS, _sides(role)[side]), grads)
            return jax.tree.map(lambda v, mean: decay * v + (1.0 - decay) * mean, old, means)

        rows, columns = follow(state.rows, 1), follow(state.columns, 0)
        total = roles.map(lambda role, r: _mean(r, _sides(role)[0]), rows)
        updates = jax.tree.map(lambda g, r, c, t: g * (r / t) ** -0.5 * c**-0.5, grads, rows, columns, total)
        return updates, AdafactorState(optax.safe_increment(state.count), rows, columns)

    return optax.GradientTransformation(init, update)


def _sides(role: Role) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions of rows and of columns; all of a vector are rows."""
    rows, columns = role.sides
    return rows or tuple(range(len(role.axes))), columns


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.mean(x, axis=axes, keepdims=True) if axes else x
