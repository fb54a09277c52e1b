"""Controllers that choose the number of micro-steps of the next update from the measured noise of the gradient.

The gradient of an update is a sum over parts: micro-steps, and the devices of each. That the parts differ from
one another says how noisy the sum is, and this costs two scalars per part. McCandlish et al. (2018, "An
Empirical Model of Large-Batch Training") show that a batch much smaller than the noise scale S / |G|^2 wastes
updates and a much larger one wastes tokens.

Runs on the host in float64. Every decision is a pure function of (config, state, observation); the state is
plain JSON, so that a resumed run decides as an uninterrupted one would have done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

from llmjax.errors import UserError, choose
from llmjax.ranges import COUNT, FOLD, Range, Unset, check_ranges

# A gradient norm of more than this many times the expected one is a spike. Noise alone does not reach it.
SPIKE = 3.0
# The least W^2 - sum w_i^2, as a fraction of W^2: below it all weight is in one part, and rounding decides.
LEAST_PAIRS = 1e-6


@dataclasses.dataclass(frozen=True)
class ControllerConfig:
    """The `controller` section of the config: how many micro-steps k the next update has.

    name             none: only measure. noise_scale: a batch of `batch_per_noise` noise scales (McCandlish et
                     al. 2018). norm_test: k grows, and never shrinks, until S / batch <= norm_test_theta^2 |G|^2
                     (Byrd et al. 2012; Bollapragada et al. 2018; for language models Lau et al. 2024)
    k_min, k_max     micro-steps per update, at least and at most; noise shows only between parts, so where a
                     micro-step is one part (one device) k is 2 at least
    half_life        tokens, padding included, after which a measurement counts half
    hysteresis       k changes only if the wanted k differs from it by more than this fraction of it
    batch_per_noise  the wanted batch in noise scales, both in tokens with loss weight; at 1 a run takes, in the
                     paper's model, twice the fewest possible updates and twice the fewest possible tokens
    norm_test_theta  the ratio of noise to gradient that the norm test lets pass; smaller wants a larger batch

    Raises UserError for a value out of range.
    """

    name: Annotated[str, Unset("none")]
    k_min: Annotated[int, Range(1, COUNT), Unset(1)]
    k_max: Annotated[int, Range(1, COUNT), Unset(64)]
    half_life: Annotated[int, Range(1, FOLD), Unset(200_000)]
    hysteresis: Annotated[float, Range(0, 1, below=True), Unset(0.25)]
    batch_per_noise: Annotated[float, Range(1e-9, 1e9), Unset(1.0)]
    norm_test_theta: Annotated[float, Range(1e-9, 1e9), Unset(0.5)]

    def __post_init__(self) -> None:
        choose(RULES, "controller.name", self.name)
        check_ranges("controller", self)
        if self.k_min > self.k_max:
            raise UserError(
                f"controller.k_min={self.k_min} is greater than controller.k_max={self.k_max}; swap or change them"
            )


@dataclasses.dataclass(frozen=True)
class Rule:
    """One value of `controller.name`.

    wanted      (config, noise scale in micro-steps) -> the wanted k, not yet a whole number; None: k is not decided on
    rounded     of a k within bounds
    only_grows  k never shrinks
    """

    wanted: Callable[[ControllerConfig, float], float] | None = None
    rounded: Callable[[float], int] = round
    only_grows: bool = False

    @property
    def decides(self) -> bool:
        return self.wanted is not None


RULES = {
    "none": Rule(),
    "noise_scale": Rule(lambda config, steps: config.batch_per_noise * steps),
    "norm_test": Rule(lambda config, steps: steps / config.norm_test_theta**2, math.ceil, only_grows=True),
}


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one update measured of its gradient; s_i is the gradient *sum* of part i and w_i its loss weight.

    tokens               positions consumed, padding included
    weight               W = sum_i w_i
    weight_square_parts  sum_i w_i^2
    square_parts         sum_i |s_i|^2
    square_total         |sum_i s_i|^2
    num_parts            micro-steps, or micro-steps x devices; dropped and empty parts count
    """

    tokens: float
    weight: float
    weight_square_parts: float
    square_parts: float
    square_total: float
    num_parts: int


@dataclasses.dataclass(frozen=True)
class ControllerState:
    """k, why it is what it is, and the averages: sums in which a past token counts 2^-(age / half_life).

    k               micro-steps of the next update
    signal, noise   sums of amount x estimate of |G|^2, and of S
    amount          what to divide these by: tokens with loss weight, fewer where one part holds most of it
    weight, tokens  the ratio is the loss weight of a position
    rejected        tokens of the spikes since the last measurement that was no spike
    reason          one sentence
    """

    k: int
    signal: float = 0.0
    noise: float = 0.0
    amount: float = 0.0
    weight: float = 0.0
    tokens: float = 0.0
    rejected: float = 0.0
    reason: str = "nothing measured yet"

    @property
    def gradient_square(self) -> float | None:
        """|G|^2 of the true gradient; unbiased, so that noise can make it negative. None before a measurement."""
        return self.signal / self.amount if self.amount else None

    @property
    def variance(self) -> float | None:
        """S, the trace of the covariance of the gradient of one token. None before a measurement."""
        return self.noise / self.amount if self.amount else None

    @property
    def noise_scale(self) -> float | None:
        """S / |G|^2 in tokens with loss weight, infinite where the gradient drowns. None before a measurement."""
        if not self.amount:
            return None
        return max(self.noise, 0.0) / self.signal if self.signal > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ControllerState:
        """The state that `to_dict` wrote."""
        return cls(**saved)


def initial_state(config: ControllerConfig, k: int) -> ControllerState:
    """The state of a run that begins with `k` micro-steps per update, or the nearest number allowed."""
    if not RULES[config.name].decides:
        return ControllerState(k)
    return ControllerState(min(max(k, config.k_min), config.k_max))


def estimate(observation: Observation) -> tuple[float, float] | None:
    """(|G|^2, S) without bias from one update; None where it says nothing of them.

    McCandlish et al. 2018, appendix A.1, for parts of any weights. With E s_i = w_i G and Var s_i = w_i S,

        E |sum s_i|^2 = W^2 |G|^2 + W S   and   E sum |s_i|^2 = sum w_i^2 |G|^2 + W S,

    two equations for two unknowns. Equal weights give the paper's formula.
    """
    o = observation
    if not all(map(math.isfinite, dataclasses.astuple(o))) or min(o.tokens, o.weight, o.square_parts) <= 0:
        return None
    pairs = o.weight**2 - o.weight_square_parts
    if pairs <= LEAST_PAIRS * o.weight**2:
        return None
    gradient_square = (o.square_total - o.square_parts) / pairs
    return gradient_square, (o.square_parts - o.weight_square_parts * gradient_square) / o.weight


def observe(
    config: ControllerConfig, state: ControllerState, observation: Observation, tokens_per_micro_step: int
) -> ControllerState:
    """The state after one more update: its averages, and the k of the next update with the reason.

    A spike is left out and k stays: an exploding gradient looks *less* noisy, so that believing it would shrink
    the batch at the worst moment. A half-life of nothing but spikes is a new level and is believed.
    """
    k = state.k
    measured = estimate(observation)
    if measured is None:
        if RULES[config.name].decides and observation.num_parts < 2 and k < min(2, config.k_max):
            return dataclasses.replace(state, k=2, reason=f"one part shows no noise: {k} -> 2")
        return dataclasses.replace(state, reason=f"nothing to measure: k = {k} stays")
    norm = math.sqrt(observation.square_total) / observation.weight
    expected = _expected_norm(state, observation)
    if norm > SPIKE * expected and state.rejected < config.half_life:
        reason = f"gradient norm {norm:.3g} spikes over the expected {expected:.3g}: k = {k} stays"
        return dataclasses.replace(state, rejected=state.rejected + observation.tokens, reason=reason)
    state = _fold(config, state, observation, measured)
    if not RULES[config.name].decides:
        return dataclasses.replace(state, reason=f"controller.name=none: k = {k} stays")
    parts_per_micro_step = observation.num_parts * tokens_per_micro_step / observation.tokens
    # Noise does not show in one part: on one device, k = 1 would be blind for ever.
    least = max(config.k_min, 1 if parts_per_micro_step >= 2 else 2)
    k, reason = _decide(config, state, tokens_per_micro_step, min(least, config.k_max))
    return dataclasses.replace(state, k=k, reason=reason)


def _expected_norm(state: ControllerState, observation: Observation) -> float:
    """The expected norm of the divided gradient s / W: E |s / W|^2 = |G|^2 + S / W.

    It depends on the weight W of the update, so that a change of k alone is not taken for a spike.
    """
    if not state.amount:
        return math.inf
    square = (max(state.signal, 0.0) + max(state.noise, 0.0) / observation.weight) / state.amount
    return math.sqrt(square) if square > 0 else math.inf


def _fold(
    config: ControllerConfig, state: ControllerState, o: Observation, measured: tuple[float, float]
) -> ControllerState:
    """The averages with one more `estimate`, which counts by its tokens, and less where few parts hold them.

    Numerator and denominator of the noise scale are averaged apart: a mean of their ratios would be biased and
    at the mercy of denominators near 0. The sums are divided by their own amount, so the start needs no correction.
    """
    keep, amount = 0.5 ** (o.tokens / config.half_life), o.weight - o.weight_square_parts / o.weight
    gradient_square, variance = measured
    return dataclasses.replace(
        state,
        signal=keep * state.signal + amount * gradient_square,
        noise=keep * state.noise + amount * variance,
        amount=keep * state.amount + amount,
        weight=keep * state.weight + o.weight,
        tokens=keep * state.tokens + o.tokens,
        rejected=0.0,
    )


def _decide(
    config: ControllerConfig, state: ControllerState, tokens_per_micro_step: int, least: int
) -> tuple[int, str]:
    """The next k, from `least` to k_max and at most a factor of 2 away, and the sentence that explains it."""
    k, scale, rule = state.k, state.noise_scale, RULES[config.name]
    assert scale is not None and rule.wanted is not None  # there is a measurement, and the rule decides
    # The noise scale counts loss weight, a micro-step positions.
    steps = scale / (tokens_per_micro_step * state.weight / state.tokens)
    wanted = rule.wanted(config, steps)
    goal = rule.rounded(min(max(wanted, k if rule.only_grows else least, least), config.k_max))
    why = f"noise scale {scale:,.0f} tokens wants k = {wanted:,.1f}"
    if scale == math.inf:
        why = f"gradient drowns in its noise (|G|^2 = {state.gradient_square:.2g})"
    bound = ""
    if wanted > config.k_max:
        bound = f", held by k_max = {config.k_max}"
    elif rule.only_grows and wanted <= k:
        bound = ", which passes the norm test"
    elif wanted < least:
        bound = f", held by k >= {least}"
    if least <= k <= config.k_max and abs(goal - k) <= config.hysteresis * k:
        return k, f"{why}: k = {k} stays" + (bound if goal == k else ", within hysteresis")
    new = min(max(goal, -(-k // 2)), 2 * k)
    new = min(max(new, least), config.k_max)
    if new != goal:
        bound = ", at most doubled" if new > k else ", at most halved"
    return new, f"{why}: {k} -> {new}{bound}"
