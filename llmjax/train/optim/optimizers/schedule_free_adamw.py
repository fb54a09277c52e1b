"""Schedule-free AdamW: an average of the iterates in place of a decaying learning rate (Defazio et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import optax

from llmjax.errors import UserError
from llmjax.ranges import Range, Unset, check_ranges
from llmjax.train.optim.optimizers.contract import (
    DECAY,
    Hyperparameters,
    OptimizerKind,
    Sections,
    decay_and_scale,
)
from llmjax.train.optim.optimizers.moments import follow_decay
from llmjax.train.optim.param_roles import Roles


@dataclasses.dataclass(frozen=True)
class ScheduleFreeAdamWConfig:
    """The `schedule_free_adamw` section of the config.

    beta1  the weight of the average, against the newest iterate, in the parameters at which gradients are taken. It
           takes the place of momentum
    beta2  the decay of the second moment per update
    eps    added to the root of the second moment, so that a gradient near zero makes no large step

    Raises UserError for a value out of range.
    """

    beta1: Annotated[float, DECAY, Unset(0.9)]
    beta2: Annotated[float, DECAY, Unset(0.95)]
    eps: Annotated[float, Range(1e-30, 1e3), Unset(1e-8)]

    def __post_init__(self) -> None:
        check_ranges("schedule_free_adamw", self)
        if self.beta1 == 0:
            raise UserError(
                "schedule_free_adamw.beta1=0 leaves schedule_free_adamw nothing to interpolate; use for example 0.9"
            )


def _decays(sections: Sections) -> dict[str, float]:
    own: ScheduleFreeAdamWConfig = sections["schedule_free_adamw"]
    return {"beta2": own.beta2}


def _transform(sections: Sections, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    """Trains y, the parameters in the training state, at which gradients are taken.

    y = beta1 * x + (1 - beta1) * z, where z is the newest iterate and x the average of the iterates, which evaluation
    wants. optax stores z and computes x from y and z, so `beta1` must stay the same in all updates.
    """
    own: ScheduleFreeAdamWConfig = sections["schedule_free_adamw"]
    beta2 = hyper.decays["beta2"]
    rms = optax.scale_by_rms(beta2, own.eps, eps_in_sqrt=False, bias_correction=True)
    rms = follow_decay(rms, beta2, own.beta2)
    inner = optax.chain(rms, *decay_and_scale(hyper, roles))
    # The learning rate is passed as a function, because optax then keeps its square, the weight of an iterate in the
    # average, in the dtype of the state.
    return optax.contrib.schedule_free(inner, lambda count: hyper.learning_rate, b1=own.beta1)


SCHEDULE_FREE_ADAMW = OptimizerKind(
    ScheduleFreeAdamWConfig,
    reads=("schedule_free_adamw",),
    decays=_decays,
    transform=_transform,
    eval_params=optax.contrib.schedule_free_eval_params,
)
