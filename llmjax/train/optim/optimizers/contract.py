"""What each optimizer tells the rest of the package: its section of the config, its decays and its transformation.

An optimizer is one file in this folder, one line in `table.py` and the lines of its section in configs/base.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from llmjax.ranges import Range
from llmjax.train.optim.optimizers.moments import OptState
from llmjax.train.optim.param_roles import Roles
from llmjax.types import Array, Params

# The range of a decay per update. In float32, 1 - decay must be more than 0 for a moment to move at all.
DECAY = Range(0, 0.999999)

# The sections of all optimizers, by the names of the optimizers.
Sections = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one update. They are Python floats on the host, and float32 [] inside the step.

    decays  what `OptimizerKind.decays` names, each raised to the power that the size of this update asks for
    """

    learning_rate: Array | float
    weight_decay: Array | float
    decays: dict[str, Array | float]


@dataclasses.dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    section      the dataclass of the config section that has the name of the optimizer
    reads        the names of all sections that the optimizer reads. A key of another section has no effect and may
                 not be set
    decays       (sections) -> the decay of each moment per update of train.tokens_per_update tokens, by a name of the
                 optimizer's own choice. They come back in `Hyperparameters.decays`, adapted to the size of the update
    transform    (sections, hyperparameters, roles) -> the optax transformation that turns a clipped gradient into
                 what is added to the parameters, weight decay and learning rate included
    eval_params  (state of the transformation, params) -> the parameters to evaluate with, for an optimizer that
                 averages; None where these are the parameters in training
    """

    section: type
    reads: tuple[str, ...]
    decays: Callable[[Sections], dict[str, float]]
    transform: Callable[[Sections, Hyperparameters, Roles], optax.GradientTransformation]
    eval_params: Callable[[OptState, Params], Params] | None = None


def decay_and_scale(hyper: Hyperparameters, roles: Roles) -> tuple[optax.GradientTransformation, ...]:
    """The end of every optimizer's chain: decoupled weight decay (Loshchilov and Hutter 2019), then the learning rate.

    Norm scales and biases do not decay.
    """
    return (
        optax.add_decayed_weights(hyper.weight_decay, roles.matrices_and_tables),
        optax.scale_by_learning_rate(hyper.learning_rate),
    )
