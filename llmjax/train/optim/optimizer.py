"""The optimizers, what changes from update to update, and how both follow the batch size.

Every optimizer is the same chain: clip the gradient (Pascanu et al. 2013), precondition, add decoupled weight
decay to everything but norms and biases (Loshchilov and Hutter 2019), multiply by the learning rate.
What a parameter is (matrix, table or vector) follows from its logical axes, see `param_roles`.

What changes from update to update (`Hyperparameters`) is computed on the host in float64, as a function of
the tokens seen and of the size of the update, and enters the compiled step as scalars: a schedule can follow
tokens while the batch grows, and nothing ever compiles again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import optax

from llmjax.errors import UserError, choose
from llmjax.ranges import COUNT, Range, check_ranges
from llmjax.train.optim.adafactor import scale_by_adafactor
from llmjax.train.optim.clip import CLIPS, make_clip
from llmjax.train.optim.moments import OptState, follow_decay, scale_by_adam
from llmjax.train.optim.muon import MUON_FORMS, MUON_MOMENTUM, muon_labels, scale_by_muon
from llmjax.train.optim.param_roles import Roles
from llmjax.train.optim.schedules import SCHEDULES, make_schedule
from llmjax.types import Array, Params

BATCH_SCALING = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # exponent of the batch in the learning rate
# (size of the update, factor on its learning rate) -> the power of the betas and the factor on weight_decay
CONSTANT_IN = {"updates": lambda size, scale: (1.0, 1.0), "tokens": lambda size, scale: (size, size / scale)}
# A decay per update. In float32, 1 - beta must be more than 0 for the moments to move at all.
BETA = Range(0, 0.999999)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The `optimizer` section of the config.

    name               adamw (Loshchilov and Hutter 2019), lion (Chen et al. 2023; wants a 3 to 10 times lower
                       learning rate and a higher decay), adafactor (Shazeer and Stern 2018, as Zhai et al.
                       2022 use it), muon (Jordan et al. 2024) or schedule_free_adamw (Defazio et al. 2024)
    learning_rate      at the peak
    schedule           after the warmup: cosine, linear, constant, or wsd (warmup, stable, decay: Hu et al.
                       2024)
    warmup_updates     over which the learning rate rises linearly
    final_lr_fraction  of the peak, reached at the last update of the schedule
    decay_fraction     of the schedule's updates, for wsd: the linear decay at the end, one update at least
    schedule_updates   how many updates of train.tokens_per_update tokens the schedule takes, warmup and decay included;
                       0 = train.num_updates. A longer run stays at the final rate, and a shorter one makes the
                       beginning of the schedule
    beta1, beta2       decay of the first and second moment. Lion: its two betas. Adafactor: momentum (0 saves
                       its memory) and the cap of its growing second-moment decay. Muon: those of AdamW for
                       embeddings, norms, biases
    eps                in AdamW's denominator
    weight_decay       per update, times the learning rate; not on norms and biases
    muon_form          debiased or reference: how Muon's momentum weighs the newest gradient, see `muon.scale_by_muon`
    clip_norm          the threshold of `clip`; 0 = off
    clip               what is clipped, see `clip.make_clip`: global, block or adaptive
    batch_scaling      the learning rate is multiplied by this root of (tokens of the update /
                       train.tokens_per_update): none, sqrt (for Adam and its kin: Malladi et al. 2022) or linear
                       (for SGD: Goyal et al. 2017)
    constant_in        updates: betas and weight_decay are what they are, whatever the batch. tokens: they are
                       those of an update of train.tokens_per_update tokens, and an update r times as large has
                       beta ** r (a half-life in tokens: Marek et al. 2025) and r times the decay, learning rate
                       included (Bergsma et al. 2025)

    Raises UserError for a value out of range.
    """

    name: str = "adamw"
    learning_rate: Annotated[float, Range(0, 1e30)] = 3e-3
    schedule: str = "cosine"
    warmup_updates: Annotated[int, Range(0, COUNT)] = 40
    final_lr_fraction: Annotated[float, Range(0, 1)] = 0.1
    decay_fraction: Annotated[float, Range(0, 1)] = 0.2
    beta1: Annotated[float, BETA] = 0.9
    beta2: Annotated[float, BETA] = 0.95
    eps: Annotated[float, Range(1e-30, 1e3)] = 1e-8
    weight_decay: Annotated[float, Range(0, 1e4)] = 0.1
    clip_norm: Annotated[float, Range(1e-12, 1e12, "off")] = 1.0
    clip: str = "global"
    batch_scaling: str = "none"
    constant_in: str = "updates"
    muon_form: str = "debiased"
    schedule_updates: Annotated[int, Range(1, COUNT, "train.num_updates")] = 0

    def __post_init__(self) -> None:
        check_ranges("optimizer", self)
        for key, choices in (
            ("name", _TRANSFORMS),
            ("schedule", SCHEDULES),
            ("clip", CLIPS),
            ("batch_scaling", BATCH_SCALING),
            ("constant_in", CONSTANT_IN),
            ("muon_form", MUON_FORMS),
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
        if self.name == "schedule_free_adamw" and self.schedule != "constant":
            raise UserError(
                f"optimizer.schedule={self.schedule!r} decays what schedule_free_adamw averages instead; "
                "set optimizer.schedule=constant"
            )
        if self.name == "schedule_free_adamw" and self.beta1 == 0:
            raise UserError(
                "optimizer.beta1=0 leaves schedule_free_adamw nothing to interpolate; use for example 0.9"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one update: Python floats on the host, float32 [] inside the step."""

    learning_rate: Array | float
    weight_decay: Array | float
    beta1: Array | float
    beta2: Array | float
    momentum: Array | float  # of Muon


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What to do with the gradient of one update.

    init(params) -> opt_state
    update(grads, opt_state, params, hyperparameters) -> (updates, opt_state), updates to be added to the parameters
    eval_params(opt_state, params) -> the parameters to evaluate with; others only for schedule-free
    hyperparameters(done, size) -> those of an update of `size` that begins at `done`, both in tokens divided by
        train.tokens_per_update, so that with a constant batch `done` counts updates and `size` is 1
    offload: opt_state lies in the memory of the hosts; the caller of `update` moves it here and back, see `offload.py`
    """

    init: Callable[[Params], OptState]
    update: Callable[[Params, OptState, Params, Hyperparameters], tuple[Params, OptState]]
    eval_params: Callable[[OptState, Params], Params]
    hyperparameters: Callable[[float, float], Hyperparameters]
    offload: bool = False


def make_optimizer(
    config: OptimizerConfig, num_updates: int, roles: Roles, *, offload: bool = False
) -> Optimizer:
    """The optimizer of `config` for a run of `num_updates` updates of train.tokens_per_update tokens.

    `roles` are those of the parameters that it will be given. `offload`: its state lies in the memory of the hosts.
    """
    schedule, scaling = make_schedule(config, num_updates), BATCH_SCALING[config.batch_scaling]

    def hyperparameters(done: float, size: float) -> Hyperparameters:
        scale = size**scaling
        r, decayed = CONSTANT_IN[config.constant_in](size, scale)
        decay = config.weight_decay * decayed
        betas = (beta**r for beta in (config.beta1, config.beta2, MUON_MOMENTUM))
        # In the middle of the updates of size 1 that it stands for, the first of which ends at done + 1.
        return Hyperparameters(scale * schedule(done + (size + 1) / 2), decay, *betas)

    def chain(hyper: Hyperparameters) -> optax.GradientTransformation:
        return optax.chain(
            make_clip(config.clip, config.clip_norm, roles), _TRANSFORMS[config.name](config, hyper, roles)
        )

    def eval_params(opt_state: OptState, params: Params) -> Params:
        if config.name != "schedule_free_adamw":
            return params
        return optax.contrib.schedule_free_eval_params(opt_state[-1], params)

    return Optimizer(
        chain(hyperparameters(0.0, 1.0)).init,
        lambda grads, opt_state, params, hyper: chain(hyper).update(grads, opt_state, params),
        eval_params,
        hyperparameters,
        offload,
    )


def _decay_and_scale(hyper: Hyperparameters, roles: Roles) -> tuple[optax.GradientTransformation, ...]:
    return (
        optax.add_decayed_weights(hyper.weight_decay, roles.matrices_and_tables),
        optax.scale_by_learning_rate(hyper.learning_rate),
    )


def _adamw(config: OptimizerConfig, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    return optax.chain(scale_by_adam(hyper.beta1, hyper.beta2, config.eps), *_decay_and_scale(hyper, roles))


def _lion(config: OptimizerConfig, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_lion(hyper.beta1, hyper.beta2), *_decay_and_scale(hyper, roles))


def _adafactor(config: OptimizerConfig, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    """Adafactor as Zhai et al. (2022, section 3.4) use it, so that AdamW's learning rate carries over.

    Factored second moment and momentum, but neither parameter scaling nor per-tensor update clipping: both
    would depend on whether layers are stacked. Momentum begins at zero and its bias is not corrected, as theirs.
    """
    momentum = optax.ema(hyper.beta1, debias=False) if config.beta1 > 0 else optax.identity()
    return optax.chain(scale_by_adafactor(hyper.beta2, roles), momentum, *_decay_and_scale(hyper, roles))


def _muon(config: OptimizerConfig, hyper: Hyperparameters, roles: Roles) -> optax.GradientTransformation:
    """Muon on the matrices inside the network, AdamW on embeddings, norms and biases. See `muon.scale_by_muon`."""
    direction = scale_by_muon(hyper.momentum, config.muon_form, roles)
    matrices = optax.chain(direction, *_decay_and_scale(hyper, roles))
    return optax.partition({"muon": matrices, "adamw": _adamw(config, hyper, roles)}, muon_labels(roles))


def _schedule_free_adamw(
    config: OptimizerConfig, hyper: Hyperparameters, roles: Roles
) -> optax.GradientTransformation:
    """Averaging in place of momentum and of a decaying learning rate (Defazio et al. 2024).

    Gradients are taken at y, the parameters of the training state; evaluation wants x, see `eval_params`. How far y
    lies from x, beta1, never changes: x is computed back from y.
    """
    rms = optax.scale_by_rms(hyper.beta2, config.eps, eps_in_sqrt=False, bias_correction=True)
    rms = follow_decay(rms, hyper.beta2, config.beta2)
    inner = optax.chain(rms, *_decay_and_scale(hyper, roles))
    # A function, since optax wants its square, which weighs an iterate in the average, in the state's dtype.
    return optax.contrib.schedule_free(inner, lambda count: hyper.learning_rate, b1=config.beta1)


_TRANSFORMS: dict[str, Callable[[OptimizerConfig, Hyperparameters, Roles], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "schedule_free_adamw": _schedule_free_adamw,
}
