"""The optimizer of a run, made from the `optimizer` section of the config and the sections of the optimizers.

Every optimizer is the same chain: clip the gradient (Pascanu et al. 2013), give it a direction, add decoupled weight
decay (Loshchilov and Hutter 2019) except for norms and biases, multiply by the learning rate. Everything after the
clipping is the optimizer's own, see the folder `optimizers`. The logical axes of a parameter say what it is (matrix,
table or vector), see `param_roles`.

The hyperparameters of an update are a function of the tokens seen and of the size of the update. The host computes
them in float64, and they enter the compiled step as scalars. So a schedule can follow the tokens while the batch grows,
and nothing ever compiles again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import optax

from llmjax.errors import UserError, choose
from llmjax.ranges import COUNT, Range, Unset, check_ranges
from llmjax.train.optim.clip import CLIPS, make_clip
from llmjax.train.optim.layer_decay import scale_by_depth
from llmjax.train.optim.optimizers.contract import Hyperparameters, Sections
from llmjax.train.optim.optimizers.moments import OptState
from llmjax.train.optim.optimizers.table import OPTIMIZERS
from llmjax.train.optim.param_roles import Roles
from llmjax.train.optim.schedules import SCHEDULES, make_schedule
from llmjax.types import Params

# The learning rate is multiplied by the size of the update raised to this exponent.
BATCH_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
# (size of the update, factor on its learning rate) -> (exponent of the decays, factor on weight_decay). The product of
# learning rate and weight decay is what shrinks a parameter, so the factor on the learning rate is divided out.
CONSTANT_IN = {"updates": lambda size, scale: (1.0, 1.0), "tokens": lambda size, scale: (size, size / scale)}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The `optimizer` section of the config: the keys that all optimizers share.

    name               one of `OPTIMIZERS`. The keys of an optimizer's own are in the section of its name
    learning_rate      the learning rate at the peak of the schedule
    schedule           what follows the warmup: cosine, linear, constant, or wsd (warmup, stable, decay: Hu et al. 2024)
    warmup_updates     updates over which the learning rate rises linearly
    final_lr_fraction  the learning rate at the last update of the schedule, as a fraction of the peak
    decay_fraction     the fraction of the schedule's updates that the linear decay at the end of wsd takes, one update
                       at least
    schedule_updates   how many updates of train.tokens_per_update tokens the schedule takes, warmup and decay included;
                       0 = train.num_updates. A longer run stays at the final rate, and a shorter run ends before the
                       schedule does
    weight_decay       the fraction of a parameter, times the learning rate, that an update takes away. Norms and
                       biases do not decay
    clip_norm          the threshold of `clip`; 0 = off
    clip               what is clipped: global, block or adaptive, see `clip.make_clip`
    batch_scaling      the learning rate is multiplied by this root of (tokens of the update /
                       train.tokens_per_update): none, sqrt (for Adam and its kin: Malladi et al. 2022) or linear
                       (for SGD: Goyal et al. 2017)
    layer_decay        the learning rate of each layer / that of the layer above it, see `layer_decay`; 1 = the same
    constant_in        updates: decays of moments and weight_decay are the same in every update, whatever its batch.
                       tokens: they belong to an update of train.tokens_per_update tokens. An update r times as large
                       has decay ** r, which keeps the half-life in tokens (Marek et al. 2025), and r times the weight
                       decay, learning rate included (Bergsma et al. 2025)

    Raises UserError for a value out of range.
    """

    name: str
    learning_rate: Annotated[float, Range(0, 1e30)]
    schedule: str
    warmup_updates: Annotated[int, Range(0, COUNT)]
    final_lr_fraction: Annotated[float, Range(0, 1)]
    decay_fraction: Annotated[float, Range(0, 1)]
    weight_decay: Annotated[float, Range(0, 1e4)]
    clip_norm: Annotated[float, Range(1e-12, 1e12, "off")]
    clip: Annotated[str, Unset("global")]
    batch_scaling: Annotated[str, Unset("none")]
    constant_in: Annotated[str, Unset("updates")]
    layer_decay: Annotated[float, Range(0, 1, above=True), Unset(1.0)]
    schedule_updates: Annotated[int, Range(1, COUNT, "train.num_updates"), Unset(0)]

    def __post_init__(self) -> None:
        check_ranges("optimizer", self)
        for key, choices in (
            ("name", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("clip", CLIPS),
            ("batch_scaling", BATCH_SCALING),
            ("constant_in", CONSTANT_IN),
        ):
            choose(choices, f"optimizer.{key}", getattr(self, key))
        if self.schedule_updates and self.schedule == "constant":
            raise UserError(
                f"optimizer.schedule_updates={self.schedule_updates} has no meaning with "
                "optimizer.schedule='constant', which has no end; set it to 0"
            )
        if 0 < self.schedule_updates <= self.warmup_updates:
            raise UserError(
                f"optimizer.schedule_updates={self.schedule_updates} leaves nothing after "
                f"optimizer.warmup_updates={self.warmup_updates}; raise the first or lower the second"
            )
        if OPTIMIZERS[self.name].eval_params is not None and self.schedule != "constant":
            raise UserError(
                f"optimizer.schedule={self.schedule!r} decays what {self.name} averages instead; "
                "set optimizer.schedule=constant"
            )
        if OPTIMIZERS[self.name].eval_params is not None and self.layer_decay != 1:
            raise UserError(
                f"optimizer.layer_decay={self.layer_decay} changes what is averaged in another way than {self.name} "
                "knows; set it to 1, or use optimizer.name=adamw"
            )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What to do with the gradient of one update.

    init             (params) -> opt_state
    update           (grads, opt_state, params, hyperparameters) -> (updates, opt_state). The updates are to be added to
                     the parameters
    eval_params      (opt_state, params) -> the parameters to evaluate with. Where `averages` is False they are `params`
    hyperparameters  (done, size) -> the hyperparameters of an update of `size` that begins after `done`. Both are in
                     tokens divided by train.tokens_per_update, so that with a constant batch `done` counts updates and
                     `size` is 1
    averages         whether the parameters to evaluate with are an average, which differs from those in training
    offload          whether opt_state lies in the memory of the hosts. Whoever calls `update` moves it to the device
                     before and back after, see `offload.to_device` and `offload.to_host`
    """

    init: Callable[[Params], OptState]
    update: Callable[[Params, OptState, Params, Hyperparameters], tuple[Params, OptState]]
    eval_params: Callable[[OptState, Params], Params]
    hyperparameters: Callable[[float, float], Hyperparameters]
    averages: bool = False
    offload: bool = False


def make_optimizer(
    config: OptimizerConfig,
    sections: Sections,
    num_updates: int,
    roles: Roles,
    *,
    offload: bool = False,
    num_layers: int = 0,
) -> Optimizer:
    """The optimizer of a run of `num_updates` updates of train.tokens_per_update tokens.

    `sections` holds the sections of all optimizers, and `roles` describes the parameters to be trained. With `offload`
    the optimizer's state lies in the memory of the hosts. `num_layers` are those of the model, for layer_decay.
    """
    kind = OPTIMIZERS[config.name]
    schedule, scaling = make_schedule(config, num_updates), BATCH_SCALING[config.batch_scaling]

    def hyperparameters(done: float, size: float) -> Hyperparameters:
        scale = size**scaling
        exponent, decay_factor = CONSTANT_IN[config.constant_in](size, scale)
        decays = {name: decay**exponent for name, decay in kind.decays(sections).items()}
        # This update stands for `size` updates of size 1, which end at done + 1, ..., done + size. It takes the rate at
        # the middle of them.
        rate = schedule(done + (size + 1) / 2)
        return Hyperparameters(scale * rate, config.weight_decay * decay_factor, decays)

    def chain(hyper: Hyperparameters) -> optax.GradientTransformation:
        clip, own = make_clip(config.clip, config.clip_norm, roles), kind.transform(sections, hyper, roles)
        if config.layer_decay == 1:
            return optax.chain(clip, own)
        return optax.chain(clip, own, scale_by_depth(config.layer_decay, num_layers, roles))

    def eval_params(opt_state: OptState, params: Params) -> Params:
        # The last state of the chain is the one of the optimizer itself, after the clipping: one that averages allows
        # nothing after it.
        return params if kind.eval_params is None else kind.eval_params(opt_state[-1], params)

    return Optimizer(
        chain(hyperparameters(0.0, 1.0)).init,
        lambda grads, opt_state, params, hyper: chain(hyper).update(grads, opt_state, params),
        eval_params,
        hyperparameters,
        averages=kind.eval_params is not None,
        offload=offload,
    )
