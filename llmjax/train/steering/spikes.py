"""Loss spikes and gradient spikes: what counts as one, and the running levels that decide it.

A run of any size can suddenly leave its path (Chowdhery et al. 2022, "PaLM", section 5.1: about 20 spikes at 540B
parameters, passed by going back to a checkpoint and past some hundred batches). Skipping the update is the
cheaper remedy where the spike is caught before it is applied, as SkipStepOptimizer of OLMo-core does with a loss or
gradient norm more than six standard deviations above its mean.

Losses and norms are positive and scatter by factors, so levels are kept of their logarithms: a running mean
and a running mean absolute deviation, both of values cut off at the limit. A spike therefore hardly moves them,
whereas a lasting shift widens the deviation by a factor each update and is soon accepted, so that nothing can
block training for ever.

Runs on the host in float64, but for the comparison itself, which the device makes too: the limits of update n come from
updates up to n - 2, are float32 numbers, and `is_spike` is the only definition, on both sides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, NamedTuple

import numpy as np

from llmjax.errors import choose
from llmjax.ranges import COUNT, FOLD, Range, Unset, check_ranges

# The least half-life in updates: a deviation needs about this many values, however many tokens an update has.
LEAST_HALF_LIFE = 16
# The least deviation of a logarithm: where nothing scatters, a rise of a few percent is no spike yet.
LEAST_DEVIATION = 0.01
# The standard deviation of a normal distribution divided by its mean absolute deviation.
PER_ABSOLUTE = math.sqrt(math.pi / 2)
# Just below the logarithm of the largest float32, 88.72.
LOG_FLOAT32_MAX = 88.0


@dataclasses.dataclass(frozen=True)
class Reaction:
    """One value of `stability.on_spike`.

    words    what is said to have been done about a spike: of an update that was applied, and of one that was not
    looks    there are limits, so that there are spikes
    skips    the device does not apply an update beyond them
    rewinds  the run goes back to the last checkpoint
    """

    words: tuple[str, str]
    looks: bool = True
    skips: bool = False
    rewinds: bool = False


ON_SPIKE = {
    "none": Reaction(("trained on", "trained on"), looks=False),
    "warn": Reaction(("trained on", "trained on")),
    "skip": Reaction(("trained on", "update skipped"), skips=True),
    "rewind": Reaction(("going back", "going back"), rewinds=True),
}


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """The `stability` section of the config.

    on_spike        none: do not look. warn: say so, and train on. skip: the update is not applied (OLMo-core).
                    rewind: go back to the last checkpoint and past the data since (Chowdhery et al. 2022)
    threshold       of a spike, in standard deviations above the running level of log loss or log gradient norm,
                    one deviation counting as 0.01 at least; 6 as in OLMo-core
    half_life       tokens after which a value counts half in the levels, but 16 updates at least
    warmup_updates  before which nothing is a spike
    max_skips       updates skipped or wholly dropped in a row, at which the run stops

    Raises UserError for a value out of range.
    """

    on_spike: Annotated[str, Unset("warn")]
    threshold: Annotated[float, Range(0, 1e6, above=True), Unset(6.0)]
    half_life: Annotated[int, Range(1, FOLD), Unset(200_000)]
    warmup_updates: Annotated[int, Range(10, COUNT), Unset(50)]
    max_skips: Annotated[int, Range(1, COUNT), Unset(20)]

    def __post_init__(self) -> None:
        check_ranges("stability", self)
        choose(ON_SPIKE, "stability.on_spike", self.on_spike)


class Limits(NamedTuple):
    """Above which an update is a spike; Python floats that float32 holds exactly, or float32 [] on the device."""

    loss: Any
    grad_norm: Any


OFF = Limits(math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Spike:
    """An update that was one: `kind` is "loss" or "gradient norm", `sentence` says it in words."""

    kind: str
    value: float
    limit: float
    sentence: str


@dataclasses.dataclass(frozen=True)
class Level:
    """Where the logarithm of a positive series runs: decayed mean, mean absolute deviation, amount behind them."""

    mean: float = 0.0
    deviation: float = 0.0
    amount: float = 0.0
    count: int = 0

    def reach(self, threshold: float) -> float:
        """How far above or below the mean a logarithm may lie."""
        return threshold * max(PER_ABSOLUTE * self.deviation, LEAST_DEVIATION)

    def limit(self, config: StabilityConfig) -> float:
        """The largest value that is no spike, as float32 holds it."""
        log = self.mean + self.reach(config.threshold)
        if self.count < config.warmup_updates or log > LOG_FLOAT32_MAX:
            return math.inf
        return float(np.float32(math.exp(log)))

    def fold(self, config: StabilityConfig, tokens: float, value: float) -> Level:
        """The level with one more value. A value far outside counts as one at the edge, one without a log not."""
        if not 0 < value < math.inf:
            return self
        log = math.log(value)
        keep = max(0.5 ** (tokens / config.half_life), 0.5 ** (1 / LEAST_HALF_LIFE))
        if self.count == 0:
            return Level(log, 0.0, 1.0, 1)
        reach, amount = self.reach(config.threshold), keep * self.amount + 1.0
        error = min(max(log - self.mean, -reach), reach)
        deviation = self.deviation + (abs(error) - self.deviation) / amount
        return Level(self.mean + error / amount, deviation, amount, self.count + 1)


@dataclasses.dataclass(frozen=True)
class StabilityState:
    """The levels of loss and gradient norm, and how many updates in a row were not applied."""

    loss: Level = Level()
    grad_norm: Level = Level()
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StabilityState:
        """The state that `to_dict` wrote."""
        return cls(Level(**saved["loss"]), Level(**saved["grad_norm"]), saved["skipped"])


def limits(config: StabilityConfig, state: StabilityState) -> Limits:
    """The limits of the next update; infinite during the warmup and where spikes are not looked for."""
    if not ON_SPIKE[config.on_spike].looks:
        return OFF
    return Limits(state.loss.limit(config), state.grad_norm.limit(config))


def device_limits(config: StabilityConfig, limits: Limits) -> Limits:
    """What the compiled step skips by: `limits` where it is to skip, infinite otherwise."""
    return limits if ON_SPIKE[config.on_spike].skips else OFF


def is_spike(limits: Limits, loss: Any, grad_norm: Any) -> Any:
    """bool, or bool [] on the device; `loss` and `grad_norm` are float32 numbers. NaN is no spike: it is dropped."""
    return (loss > limits.loss) | (grad_norm > limits.grad_norm)


def observe(
    config: StabilityConfig,
    state: StabilityState,
    limits: Limits,
    tokens: float,
    loss: float,
    grad_norm: float,
    applied: bool,
) -> tuple[StabilityState, Spike | None]:
    """The state after one more update, and the spike that it was under the `limits` it was run with.

    tokens     positions of the update, padding included
    loss       mean loss of the update, the float32 number that the device compared
    grad_norm  of the divided gradient before clipping, likewise
    applied    whether the parameters changed: False where the device skipped the update or dropped all of it
    """
    spike = None
    if is_spike(limits, loss, grad_norm):
        kind, value, limit, level = "gradient norm", grad_norm, limits.grad_norm, state.grad_norm
        if loss > limits.loss:
            kind, value, limit, level = "loss", loss, limits.loss, state.loss
        usual = math.exp(level.mean)
        sentence = f"{kind} {value:.4g} is a spike: its limit was {limit:.4g}, its running level {usual:.4g}"
        spike = Spike(kind, value, limit, sentence)
    new = StabilityState(
        state.loss.fold(config, tokens, loss),
        state.grad_norm.fold(config, tokens, grad_norm),
        0 if applied else state.skipped + 1,
    )
    return new, spike


def stop_reason(config: StabilityConfig, state: StabilityState) -> str | None:
    """One sentence where the run must stop, None where it goes on."""
    if state.skipped < config.max_skips:
        return None
    return (
        f"the last {state.skipped} updates were all skipped or dropped, as many as stability.max_skips="
        f"{config.max_skips} allows; lower optimizer.learning_rate or resume from an earlier checkpoint"
    )
