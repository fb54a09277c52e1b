"""Adafactor: a second moment that holds rows and columns instead of matrices (Shazeer and Stern 2018).

The optimizer is the one of Zhai et al. (2022, section 3.4), to which AdamW's learning rate carries over: a factored
second moment and a momentum, but neither parameter scaling nor update clipping for each tensor. Those two would make
the step depend on whether layers are stacked.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.ranges import Unset, check_ranges
from llmjax.train.optim.optimizers.contract import (
    DECAY,
    Hyperparameters,
    OptimizerKind,
    Sections,
    decay_and_scale,
)
from llmjax.train.optim.param_roles import Role, Roles
from llmjax.types import Array, Params

# The decay of the second moment in update t is 1 - t ** -0.8 (Shazeer and Stern 2018, section 7.2).
EXPONENT = 0.8
# Added to the square of the gradient (Shazeer and Stern 2018, epsilon 1 in algorithm 4).
EPS = 1e-30


@dataclasses.dataclass(frozen=True)
class AdafactorConfig:
    """The `adafactor` section of the config.

    momentum   the decay of the momentum per update; 0 leaves it out and saves its memory
    decay_cap  the largest decay of the second moment per update (Zhai et al. 2022, who take 0.999)

    Raises UserError for a value out of range.
    """

    momentum: Annotated[float, DECAY, Unset(0.9)]
    decay_cap: Annotated[float, DECAY, Unset(0.95)]

    def __post_init__(self) -> None:
        check_ranges("adafactor", self)


class AdafactorState(NamedTuple):
    """The second moment of the gradient as means over the columns and over the rows of each matrix.

    count    int32 [], updates so far
    rows     like the parameters, but of length 1 along the columns. For a vector: the whole second moment
    columns  like the parameters, but of length 1 along the rows. For a vector: of length 1 along every axis
    """

    count: Array  # type: ignore[assignment]  # hides a method of tuples
    rows: Params
    columns: Params


def scale_by_adafactor(largest_decay: Array | float, roles: Roles) -> optax.GradientTransformation:
    """Divides the gradient by the root of its second moment, whose decay is 0 at first and grows to `largest_decay`.

    The second moment of element (i, j) of a matrix is rows[i] * columns[j] / mean(rows). The logical axes of a
    parameter say which of its dimensions make the rows and which the columns, as for Muon. Embeddings count as
    matrices here, and a dimension of layers is never part of a matrix. A vector (a norm scale or a bias) is a matrix
    of one column, for which the formula gives the whole second moment back. The first decay is 0, so that no bias
    towards zero needs to be corrected.
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

        # The mean over the columns (side 1) leaves one number a row, and the mean over the rows one a column.
        rows, columns = follow(state.rows, 1), follow(state.columns, 0)
        total = roles.map(lambda role, r: _mean(r, _sides(role)[0]), rows)
        # Two inverse roots instead of one of the product, which would underflow in float32.
        updates = jax.tree.map(lambda g, r, c, t: g * (r / t) ** -0.5 * c**-0.5, grads, rows, columns, total)
        return updates, AdafactorState(optax.safe_increment(state.count), rows, columns)

    return optax.GradientTransformation(init, update)


def _sides(role: Role) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions of the rows and the dimensions of the columns. All dimensions of a vector are rows."""
    rows, columns = role.sides
    return rows or tuple(range(len(role.axes))), columns


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean over `axes`, which stay with length 1; `x` itself where there are none."""
    return jnp.mean(x, axis=axes, keepdims=True) if axes else x


def _decays(sections: Sections) -> dict[str, float]:
    own: AdafactorConfig = sections["adafactor"]
    return {"momentum": own.momentum, "decay_cap": own.decay_cap}


def _transform(sections: Sections, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    own: AdafactorConfig = sections["adafactor"]
    # The momentum begins at zero, and its bias is not corrected, as in the code of Zhai et al.
    momentum = optax.ema(hyper.decays["momentum"], debias=False) if own.momentum > 0 else optax.identity()
    second_moment = scale_by_adafactor(hyper.decays["decay_cap"], roles)
    return optax.chain(second_moment, momentum, *decay_and_scale(hyper, roles))


ADAFACTOR = OptimizerKind(AdafactorConfig, reads=("adafactor",), decays=_decays, transform=_transform)
