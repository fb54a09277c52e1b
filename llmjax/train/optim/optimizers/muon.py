"""Muon: momentum whose matrices are made orthogonal before they move the parameters (Jordan et al. 2024)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from llmjax.errors import choose
from llmjax.ranges import Unset, check_ranges
from llmjax.train.optim.optimizers.adamw import adamw_decays, make_adamw
from llmjax.train.optim.optimizers.contract import (
    DECAY,
    Hyperparameters,
    OptimizerKind,
    Sections,
    decay_and_scale,
)
from llmjax.train.optim.optimizers.moments import OptState, follow_decay
from llmjax.train.optim.param_roles import Roles
from llmjax.types import Array, Params

# The root mean square of a Muon update, chosen to match what AdamW's updates have in practice (Liu et al. 2025,
# equation 4).
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """The `muon` section of the config.

    Muon trains the matrices inside the network. AdamW trains embeddings, output head, norms and biases, with the keys
    of the section `adamw`.

    momentum  the decay of the momentum per update (0.95 in Jordan et al. 2024 and Liu et al. 2025)
    form      debiased or reference: how much the momentum counts the newest gradient, see `scale_by_muon`

    Raises UserError for a value out of range.
    """

    momentum: Annotated[float, DECAY, Unset(0.95)]
    form: Annotated[str, Unset("debiased")]

    def __post_init__(self) -> None:
        check_ranges("muon", self)
        choose(MUON_FORMS, "muon.form", self.form)


def scale_by_muon(
    momentum: Array | float, unit_momentum: float, form: str, roles: Roles
) -> optax.GradientTransformation:
    """The direction of a Muon update, for trees that hold only matrices. Its root mean square is about 0.2.

    `momentum` is the decay of the momentum in this update, and `unit_momentum` the decay in an update of
    train.tokens_per_update tokens. `form` is one of `MUON_FORMS`. The momentum is Nesterov's: the newest gradient
    counts a second time. The iteration of Newton and Schulz then makes it orthogonal, which takes its scale away, so
    that a form only decides how much the newest gradient counts against the older ones.

    debiased   as optax does it: the momentum and the newest gradient are each divided by the sum of the weights in
               them (Dozat 2016). With momentum 0.95 the newest gradient counts 0.73 of all in the second update,
               where the reference counts it 0.68, and 0.39 in the fifth instead of 0.37. For independent gradients
               the second and third update differ from the reference by about 16 % of their length, the tenth by
               4 %, and the fiftieth by less than 0.3 %.
    reference  as Jordan's code does it: m = momentum * m + (1 - momentum) * g, beginning at zero, and then the same
               sum of m and g once more, without a correction.

    Both forms depart from Jordan's code in the scale of an update, which is max(1, rows / columns) ** 0.5 times an
    orthogonal matrix there and needs a learning rate of its own beside AdamW's. An orthogonal m x n matrix has the
    root mean square 1 / sqrt(max(m, n)). Here it is multiplied by 0.2 sqrt(max(m, n)), so that its root mean square
    equals the usual one of AdamW, and a single learning rate and weight decay serve all parameters (Liu et al. 2025).
    Jordan iterates in bfloat16, this function in float32.
    """

    def dimensions(params: Params) -> Params:
        return roles.map(lambda role, _: MuonDimensionNumbers(*role.sides), params)

    inner = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions)
    orthogonal = MUON_FORMS[form](inner, momentum, unit_momentum)

    def update(grads: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        updates, state = orthogonal.update(grads, state, params)
        return jax.tree.map(_match_rms, updates, dimensions(updates)), state

    return optax.GradientTransformation(orthogonal.init, update)


def _match_rms(x: Array, numbers: MuonDimensionNumbers) -> Array:
    """An orthogonal matrix times 0.2 sqrt(max(m, n)), where m x n are its rows and columns."""
    rows, columns = ([x.shape[axis] for axis in axes] for axes in numbers)
    return MUON_RMS * max(math.prod(rows), math.prod(columns)) ** 0.5 * x


def _debiased(
    inner: optax.GradientTransformation, momentum: Array | float, unit_momentum: float
) -> optax.GradientTransformation:
    """optax's own form, for a momentum that may change from update to update."""
    return follow_decay(inner, momentum, unit_momentum)


def _reference(
    inner: optax.GradientTransformation, momentum: Array | float, unit_momentum: float
) -> optax.GradientTransformation:
    """The momentum without a correction of its bias."""
    counted = _debiased(inner, momentum, unit_momentum)

    def update(grads: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        # `inner` divides by 1 - momentum ** count. An infinite count makes that 1, so that nothing is corrected.
        endless = jnp.full_like(state.count, jnp.inf)
        updates, new_state = inner.update(grads, state._replace(count=endless), params)
        return updates, new_state._replace(count=state.count + 1)

    return optax.GradientTransformation(counted.init, update)


# A form takes optax's Muon, the momentum of this update, and the momentum of an update of the size 1.
MUON_FORMS: dict[
    str, Callable[[optax.GradientTransformation, Array | float, float], optax.GradientTransformation]
] = {"debiased": _debiased, "reference": _reference}


def _decays(sections: Sections) -> dict[str, float]:
    own: MuonConfig = sections["muon"]
    return adamw_decays(sections) | {"momentum": own.momentum}


def _transform(sections: Sections, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    own: MuonConfig = sections["muon"]
    direction = scale_by_muon(hyper.decays["momentum"], own.momentum, own.form, roles)
    matrices = optax.chain(direction, *decay_and_scale(hyper, roles))
    others = make_adamw(sections, hyper, roles)
    return optax.partition({"muon": matrices, "adamw": others}, _labels(roles))


def _labels(roles: Roles) -> Callable[[Params], Params]:
    """`muon` for the matrices inside the network, `adamw` for embeddings, the output head, norms and biases."""
    return lambda params: roles.map(lambda role, _: "muon" if role.is_hidden_matrix else "adamw", params)


MUON = OptimizerKind(MuonConfig, reads=("muon", "adamw"), decays=_decays, transform=_transform)
