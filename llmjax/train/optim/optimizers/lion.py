"""Lion: the sign of an interpolated momentum (Chen et al. 2023).

Every element of a step has the size of the learning rate, so Lion wants a 3 to 10 times lower learning rate than AdamW
and a weight decay that is higher by as much.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import optax

from llmjax.ranges import Unset, check_ranges
from llmjax.train.optim.optimizers.contract import (
    DECAY,
    Hyperparameters,
    OptimizerKind,
    Sections,
    decay_and_scale,
)
from llmjax.train.optim.param_roles import Roles


@dataclasses.dataclass(frozen=True)
class LionConfig:
    """The `lion` section of the config. The paper's own values are 0.9 and 0.99.

    beta1  the weight of the momentum, against the newest gradient, in the sum whose sign is the step
    beta2  the decay of the momentum per update

    Raises UserError for a value out of range.
    """

    beta1: Annotated[float, DECAY, Unset(0.9)]
    beta2: Annotated[float, DECAY, Unset(0.95)]

    def __post_init__(self) -> None:
        check_ranges("lion", self)


def _decays(sections: Sections) -> dict[str, float]:
    own: LionConfig = sections["lion"]
    return {"beta1": own.beta1, "beta2": own.beta2}


def _transform(sections: Sections, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    lion = optax.scale_by_lion(hyper.decays["beta1"], hyper.decays["beta2"])
    return optax.chain(lion, *decay_and_scale(hyper, roles))


LION = OptimizerKind(LionConfig, reads=("lion",), decays=_decays, transform=_transform)
