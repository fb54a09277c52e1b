"""Controllers that choose the number of micro-steps of the next update from the measured noise of the gradient.

The gradient of an update is a sum over parts: one part for each micro-step, or for each device in each micro-step. How
much the parts differ from one another tells how noisy the sum is, and measuring it costs two scalars per part. G is the
true gradient of the loss per token, and S the trace of the covariance of the gradient of one token. McCandlish et al.
(2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162) show that a batch much smaller than the noise
scale S / |G|^2 wastes updates, and that a much larger one wastes tokens.

The controller runs on the host in float64. Every decision is a pure function of (config, state, observation). The state
is plain JSON and is saved with checkpoints, so that a resumed run takes the decisions of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

from llmjax.errors import UserError, choose
from llmjax.ranges import COUNT, FOLD, Range, Unset, check_ranges

# A choice: a gradient norm of more than this many times the expected norm is a spike. Noise alone does not reach it.
SPIKE = 3.0
# W^2 - sum w_i^2 is what the estimate divides by. Where it is a smaller fraction of W^2 than this, nearly all weight
# lies in one part and the quotient would be made of rounding errors, so there is no estimate. A choice: far above the
# rounding of the float32 sums, far below the 1/2 of two equal parts.
LEAST_PAIRS = 1e-6


@dataclasses.dataclass(frozen=True)
class ControllerConfig:
    """The `controller` section of the config: how many micro-steps k the next update has.

    name             none: the noise is measured and k is left to the schedule. noise_scale: the batch becomes
                     `batch_per_noise` noise scales (McCandlish et al. 2018). norm_test: k grows, and never shrinks,
                     until S / batch <= norm_test_theta^2 |G|^2 (Byrd et al. 2012; Bollapragada et al. 2018; for
                     language models Lau et al. 2024)
    k_min, k_max     the fewest and the most micro-steps of an update. Noise is visible only as a difference between
                     parts, so k is at least 2 if a micro-step has only one part, as on one device
    half_life        tokens, padding included, after which a measurement counts half
    hysteresis       k stays as it is unless the wanted k differs from it by more than this fraction of k
    batch_per_noise  the size of the wanted batch in noise scales, both counted in tokens with loss weight. With 1, in
                     the model of McCandlish et al., a run needs twice the fewest possible updates and twice the fewest
                     possible tokens
    norm_test_theta  the largest ratio of noise to gradient norm that passes the norm test. A smaller value leads to
                     larger batches

    Raises `UserError` if a value is out of range.
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
    """What one value of `controller.name` does.

    wanted      a function (config, noise scale in micro-steps) that returns the wanted k as a float, or None if the
                rule only measures
    rounded     makes an integer of a wanted k that lies within the bounds
    only_grows  whether k never shrinks
    """

    wanted: Callable[[ControllerConfig, float], float] | None = None
    rounded: Callable[[float], int] = round
    only_grows: bool = False

    @property
    def decides(self) -> bool:
        """Whether the rule chooses k. Otherwise the batch schedule does."""
        return self.wanted is not None


# The table of all rules, by controller.name.
RULES = {
    "none": Rule(),
    "noise_scale": Rule(lambda config, steps: config.batch_per_noise * steps),
    "norm_test": Rule(lambda config, steps: steps / config.norm_test_theta**2, math.ceil, only_grows=True),
}


@dataclasses.dataclass(frozen=True)
class Observation:
    """What was measured of the gradient of one update.

    s_i is the gradient of the *summed* loss of part i, and w_i the sum of the part's loss weights.

    tokens               positions of the update, padding included
    weight               W = sum_i w_i
    weight_square_parts  sum_i w_i^2
    square_parts         sum_i |s_i|^2
    square_total         |sum_i s_i|^2
    num_parts            the number of parts: micro-steps, or micro-steps x devices. Dropped and empty parts count too
    """

    tokens: float
    weight: float
    weight_square_parts: float
    square_parts: float
    square_total: float
    num_parts: int


@dataclasses.dataclass(frozen=True)
class ControllerState:
    """The k of the next update, the reason for it, and running averages of the measurements.

    The averages are kept as decayed sums: an update that ended n tokens ago counts with the factor 2^-(n / half_life).

    k         micro-steps of the next update
    signal    decayed sum of the estimates of |G|^2, each times its amount (see `_updated_averages`)
    noise     decayed sum of the estimates of S, each times its amount
    amount    decayed sum of the amounts. signal / amount and noise / amount are the averages
    weight    decayed sum of the loss weights
    tokens    decayed sum of the positions, padding included. weight / tokens is the mean loss weight of a position
    rejected  tokens of the updates that were rejected as spikes since the last update that was not
    reason    one sentence on why k is what it is
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
        """The estimate of |G|^2, or None before the first measurement.

        It is unbiased and can therefore be negative if the noise is large.
        """
        return self.signal / self.amount if self.amount else None

    @property
    def variance(self) -> float | None:
        """The estimate of S, the trace of the covariance of the gradient of one token, or None before the first
        measurement."""
        return self.noise / self.amount if self.amount else None

    @property
    def noise_scale(self) -> float | None:
        """The noise scale S / |G|^2 in tokens with loss weight, or None before the first measurement.

        It is infinite if the estimate of |G|^2 is not positive, that is, if the gradient is too small to be seen in
        its noise.
        """
        if not self.amount:
            return None
        return max(self.noise, 0.0) / self.signal if self.signal > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The state as plain values, which JSON keeps exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ControllerState:
        """The state that `to_dict` wrote."""
        return cls(**saved)


def initial_state(config: ControllerConfig, k: int) -> ControllerState:
    """The state of a new run.

    It begins with `k` micro-steps per update. If the controller decides, it begins with the nearest number from k_min
    to k_max instead.
    """
    if not RULES[config.name].decides:
        return ControllerState(k)
    return ControllerState(min(max(k, config.k_min), config.k_max))


def estimate(observation: Observation) -> tuple[float, float] | None:
    """Unbiased estimates of (|G|^2, S) from one update, or None if the update cannot give them.

    This is the estimator of McCandlish et al. 2018, appendix A.1, for parts of unequal weights. Since E s_i = w_i G
    and the trace of the covariance of s_i is w_i S,

        E |sum s_i|^2 = W^2 |G|^2 + W S   and   E sum |s_i|^2 = sum w_i^2 |G|^2 + W S.

    The two measured squares stand for their expectations, and the two equations are solved for |G|^2 and S. With equal
    weights this is the formula of the paper.
    """
    o = observation
    if not all(map(math.isfinite, dataclasses.astuple(o))) or min(o.tokens, o.weight, o.square_parts) <= 0:
        return None
    # W^2 - sum w_i^2 = sum of w_i w_j over i != j: only pairs of different parts tell signal from noise.
    pairs = o.weight**2 - o.weight_square_parts
    if pairs <= LEAST_PAIRS * o.weight**2:
        return None
    gradient_square = (o.square_total - o.square_parts) / pairs
    return gradient_square, (o.square_parts - o.weight_square_parts * gradient_square) / o.weight


def observe(
    config: ControllerConfig, state: ControllerState, observation: Observation, tokens_per_micro_step: int
) -> ControllerState:
    """Returns the state after one more update, with the k of the next one.

    An update whose gradient norm is a spike is left out of the averages, and k stays as it is. An exploding gradient
    looks *less* noisy, so counting it would shrink the batch at the worst moment. If there is nothing but spikes for
    `half_life` tokens, the larger norm is no exception any more and is counted.

    tokens_per_micro_step  positions of a micro-step, padding included
    """
    k = state.k
    measured = estimate(observation)
    if measured is None:
        # With one part per update nothing could ever be measured. Two are the fewest that show noise.
        if RULES[config.name].decides and observation.num_parts < 2 and k < min(2, config.k_max):
            return dataclasses.replace(state, k=2, reason=f"one part shows no noise: {k} -> 2")
        return dataclasses.replace(state, reason=f"nothing to measure: k = {k} stays")
    norm = math.sqrt(observation.square_total) / observation.weight
    expected = _expected_norm(state, observation)
    if norm > SPIKE * expected and state.rejected < config.half_life:
        reason = f"gradient norm {norm:.3g} spikes over the expected {expected:.3g}: k = {k} stays"
        return dataclasses.replace(state, rejected=state.rejected + observation.tokens, reason=reason)
    state = _updated_averages(config, state, observation, measured)
    if not RULES[config.name].decides:
        return dataclasses.replace(state, reason=f"controller.name=none: k = {k} stays")
    parts_per_micro_step = observation.num_parts * tokens_per_micro_step / observation.tokens
    # With k = 1 on one device an update would have a single part, and no noise could be measured from then on.
    least = max(config.k_min, 1 if parts_per_micro_step >= 2 else 2)
    k, reason = _decide(config, state, tokens_per_micro_step, min(least, config.k_max))
    return dataclasses.replace(state, k=k, reason=reason)


def _expected_norm(state: ControllerState, observation: Observation) -> float:
    """The norm to expect of the mean gradient s / W, whose expected square is E |s / W|^2 = |G|^2 + S / W.

    The expectation includes the weight W of the update. A smaller batch has a larger norm, and without W a change of k
    could be mistaken for a spike. Infinite while nothing is known.
    """
    if not state.amount:
        return math.inf
    square = (max(state.signal, 0.0) + max(state.noise, 0.0) / observation.weight) / state.amount
    return math.sqrt(square) if square > 0 else math.inf


def _updated_averages(
    config: ControllerConfig, state: ControllerState, o: Observation, measured: tuple[float, float]
) -> ControllerState:
    """Returns the state with one more pair `measured` = `estimate(o)` in its averages.

    Numerator and denominator of the noise scale are averaged apart. A mean of their ratios would be biased, and a
    single denominator near 0 would dominate it. The sums are divided by the sum of the amounts, so the averages are
    right from the first measurement on and need no correction for a start at 0.
    """
    keep = 0.5 ** (o.tokens / config.half_life)
    # The amount is W (1 - sum (w_i / W)^2). An update counts by its weight, and less if a few parts hold most of it,
    # because few parts show less of the noise.
    amount = o.weight - o.weight_square_parts / o.weight
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
    """The next k and the sentence that explains it.

    k lies from `least` to k_max, and it at most doubles or halves from one update to the next.
    """
    k, scale, rule = state.k, state.noise_scale, RULES[config.name]
    # `observe` calls only after a measurement and with a rule that decides.
    assert scale is not None and rule.wanted is not None
    # The noise scale is in tokens with loss weight, but a micro-step is a number of positions, some without weight.
    steps = scale / (tokens_per_micro_step * state.weight / state.tokens)
    wanted = rule.wanted(config, steps)
    goal = rule.rounded(min(max(wanted, k if rule.only_grows else least, least), config.k_max))
    why = f"noise scale {scale:,.0f} tokens wants k = {wanted:,.1f}"
    if scale == math.inf:
        why = f"gradient drowns in its noise (|G|^2 = {state.gradient_square:.2g})"
    # Which bound changed the wanted k, in words.
    bound = ""
    if wanted > config.k_max:
        bound = f", held by k_max = {config.k_max}"
    elif rule.only_grows and wanted <= k:
        bound = ", which passes the norm test"
    elif wanted < least:
        bound = f", held by k >= {least}"
    if least <= k <= config.k_max and abs(goal - k) <= config.hysteresis * k:
        return k, f"{why}: k = {k} stays" + (bound if goal == k else ", within hysteresis")
    # At most half as many, rounded up, or twice as many: a wrong measurement does limited harm.
    new = min(max(goal, -(-k // 2)), 2 * k)
    new = min(max(new, least), config.k_max)
    if new != goal:
        bound = ", at most doubled" if new > k else ", at most halved"
    return new, f"{why}: {k} -> {new}{bound}"
