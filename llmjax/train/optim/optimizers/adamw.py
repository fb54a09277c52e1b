"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import optax

from llmjax.ranges import Range, Unset, check_ranges
from llmjax.train.optim.optimizers.contract import (
    DECAY,
    Hyperparameters,
    OptimizerKind,
    Sections,
    decay_and_scale,
)
from llmjax.train.optim.optimizers.moments import scale_by_adam
from llmjax.train.optim.param_roles import Roles


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """The `adamw` section of the config. Muon reads it too, for the parameters that AdamW trains there.

    beta1, beta2  the decay of the first and of the second moment per update
    eps           added to the root of the second moment, so that a gradient near zero makes no large step

    Raises UserError for a value out of range.
    """

    beta1: Annotated[float, DECAY, Unset(0.9)]
    beta2: Annotated[float, DECAY, Unset(0.95)]
    eps: Annotated[float, Range(1e-30, 1e3), Unset(1e-8)]

    def __post_init__(self) -> None:
        check_ranges("adamw", self)


def adamw_decays(sections: Sections) -> dict[str, float]:
    """The decays of both moments, `beta1` and `beta2`."""
    own: AdamWConfig = sections["adamw"]
    return {"beta1": own.beta1, "beta2": own.beta2}


def make_adamw(sections: Sections, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    """AdamW for every parameter that the transformation is given."""
    own: AdamWConfig = sections["adamw"]
    adam = scale_by_adam(hyper.decays["beta1"], hyper.decays["beta2"], own.eps)
    return optax.chain(adam, *decay_and_scale(hyper, roles))


ADAMW = OptimizerKind(AdamWConfig, reads=("adamw",), decays=adamw_decays, transform=make_adamw)
