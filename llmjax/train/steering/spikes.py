"""Loss spikes and gradient spikes: what counts as a spike, and the running levels that decide it.

The loss of a run of any size can suddenly jump up. Chowdhery et al. (2022, "PaLM", section 5.1) saw about 20 spikes at
540B parameters; they went back to a checkpoint and left out a few hundred batches. Skipping the update is a cheaper
remedy if the spike is noticed before the update is applied. SkipStepOptimizer of OLMo-core does so with a loss or
gradient norm more than six standard deviations above its mean.

Losses and gradient norms are positive and vary by factors, so the levels describe their logarithms: by a running mean
and a running mean absolute deviation. A logarithm outside of the limits counts as if it lay at the limit. A single
spike therefore hardly moves the level. A lasting shift widens the deviation with each update and is soon accepted, so
training cannot be blocked for ever.

All of this runs on the host in float64. Only the comparison with the limits is made on the device too, with the same
function, `is_spike`, and the same float32 limits, so that host and device always agree. The limits of update n follow
from the updates up to n - 2, because metrics reach the host one update late.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, NamedTuple

import numpy as np

from llmjax.errors import choose
from llmjax.ranges import COUNT, FOLD, Range, Unset, check_ranges

# The least half-life in updates. A choice: a mean absolute deviation of fewer values is too noisy, and with very large
# updates stability.half_life, which counts tokens, could be shorter than one update.
LEAST_HALF_LIFE = 16
# The least standard deviation of a logarithm. A choice: if a level hardly varies, a rise of a few percent is no spike.
LEAST_DEVIATION = 0.01
# The standard deviation of a normal distribution divided by its mean absolute deviation.
STD_PER_ABSOLUTE_DEVIATION = math.sqrt(math.pi / 2)
# Just below the logarithm of the largest float32, 88.72. A larger limit would not be finite on the device.
LOG_FLOAT32_MAX = 88.0


@dataclasses.dataclass(frozen=True)
class Reaction:
    """What one value of `stability.on_spike` does.

    words    how messages name what was done: first for an update that was applied, then for one that was not
    looks    whether the run looks for spikes at all
    skips    whether the device leaves an update that is a spike unapplied
    rewinds  whether the run goes back to the last checkpoint
    """

    words: tuple[str, str]
    looks: bool = True
    skips: bool = False
    rewinds: bool = False


# The table of all reactions, by stability.on_spike.
ON_SPIKE = {
    "none": Reaction(("trained on", "trained on"), looks=False),
    "warn": Reaction(("trained on", "trained on")),
    "skip": Reaction(("trained on", "update skipped"), skips=True),
    "rewind": Reaction(("going back", "going back"), rewinds=True),
}


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """The `stability` section of the config.

    on_spike        none: the run does not look for spikes. warn: it reports them and trains on. skip: it does not
                    apply the update (OLMo-core). rewind: it goes back to the last checkpoint and leaves out the data
                    since then (Chowdhery et al. 2022)
    threshold       how many standard deviations above its running level a log loss or log gradient norm must lie to be
                    a spike. One standard deviation is at least 0.01. OLMo-core uses 6
    half_life       tokens after which a value counts half in the levels. It is at least 16 updates
    warmup_updates  the first updates of a run, among which nothing is a spike
    max_skips       the run stops after this many updates in a row that were skipped or wholly dropped

    Raises `UserError` if a value is out of range.
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
    """An update whose loss or gradient norm is above these is a spike.

    On the host they are Python floats that float32 holds exactly, on the device float32 [].
    """

    loss: Any
    grad_norm: Any


# Limits that nothing exceeds.
OFF = Limits(math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Spike:
    """An update that was a spike.

    kind      which of the two was above its limit: "loss" or "gradient norm"; "loss" if both were
    value     the loss or the gradient norm
    limit     the limit that it exceeded
    sentence  all this in words
    """

    kind: str
    value: float
    limit: float
    sentence: str


@dataclasses.dataclass(frozen=True)
class Level:
    """The running level of the logarithms of a series of positive values.

    mean       decayed mean
    deviation  decayed mean absolute deviation from the mean
    amount     the sum of the decayed counts of the values, the effective number of values behind the two means
    count      the number of values so far
    """

    mean: float = 0.0
    deviation: float = 0.0
    amount: float = 0.0
    count: int = 0

    def reach(self, threshold: float) -> float:
        """How far above or below the mean a logarithm may lie: `threshold` standard deviations."""
        return threshold * max(STD_PER_ABSOLUTE_DEVIATION * self.deviation, LEAST_DEVIATION)

    def limit(self, config: StabilityConfig) -> float:
        """The largest value that is no spike, rounded to float32. Infinite during the warmup."""
        log = self.mean + self.reach(config.threshold)
        if self.count < config.warmup_updates or log > LOG_FLOAT32_MAX:
            return math.inf
        return float(np.float32(math.exp(log)))

    def updated(self, config: StabilityConfig, tokens: float, value: float) -> Level:
        """Returns the level with one more value, that of an update of `tokens` positions.

        A value beyond the limits counts as if it lay at the limit. A value without a finite logarithm is left out.
        """
        if not 0 < value < math.inf:
            return self
        log = math.log(value)
        # The half-life counts tokens, but is not shorter than LEAST_HALF_LIFE updates.
        keep = max(0.5 ** (tokens / config.half_life), 0.5 ** (1 / LEAST_HALF_LIFE))
        if self.count == 0:
            return Level(log, 0.0, 1.0, 1)
        reach, amount = self.reach(config.threshold), keep * self.amount + 1.0
        error = min(max(log - self.mean, -reach), reach)
        # A new value of amount 1 moves a mean by 1 / amount of its distance.
        deviation = self.deviation + (abs(error) - self.deviation) / amount
        return Level(self.mean + error / amount, deviation, amount, self.count + 1)


@dataclasses.dataclass(frozen=True)
class StabilityState:
    """What is remembered of the past updates. Checkpoints save it.

    loss       the running level of the loss
    grad_norm  the running level of the gradient norm
    skipped    how many updates in a row were not applied, up to the last one
    """

    loss: Level = Level()
    grad_norm: Level = Level()
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The state as plain values, which JSON keeps exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StabilityState:
        """The state that `to_dict` wrote."""
        return cls(Level(**saved["loss"]), Level(**saved["grad_norm"]), saved["skipped"])


def limits(config: StabilityConfig, state: StabilityState) -> Limits:
    """The limits of the next update. They are infinite during the warmup, and if the run does not look for spikes."""
    if not ON_SPIKE[config.on_spike].looks:
        return OFF
    return Limits(state.loss.limit(config), state.grad_norm.limit(config))


def device_limits(config: StabilityConfig, limits: Limits) -> Limits:
    """The limits above which the compiled step skips an update: `limits` if on_spike is to skip, otherwise infinite."""
    return limits if ON_SPIKE[config.on_spike].skips else OFF


def is_spike(limits: Limits, loss: Any, grad_norm: Any) -> Any:
    """Whether loss or gradient norm, both float32 numbers, are above the limits: bool, or bool [] on the device.

    NaN is no spike. It is dropped elsewhere.
    """
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
    """Returns the state after one more update, and the spike if the update was one, else None.

    limits     the limits with which the update was run
    tokens     positions of the update, padding included
    loss       mean loss of the update, the float32 number that the device compared
    grad_norm  norm of the mean gradient before clipping, the float32 number that the device compared
    applied    whether the parameters changed. They did not if the device skipped the update or dropped all of it
    """
    spike = None
    if is_spike(limits, loss, grad_norm):
        kind, value, limit, level = "gradient norm", grad_norm, limits.grad_norm, state.grad_norm
        # If both are above their limits, the loss is what the user knows.
        if loss > limits.loss:
            kind, value, limit, level = "loss", loss, limits.loss, state.loss
        usual = math.exp(level.mean)
        sentence = f"{kind} {value:.4g} is a spike: its limit was {limit:.4g}, its running level {usual:.4g}"
        spike = Spike(kind, value, limit, sentence)
    new = StabilityState(
        state.loss.updated(config, tokens, loss),
        state.grad_norm.updated(config, tokens, grad_norm),
        0 if applied else state.skipped + 1,
    )
    return new, spike


def stop_reason(config: StabilityConfig, state: StabilityState) -> str | None:
    """One sentence on why the run must stop, or None if it goes on."""
    if state.skipped < config.max_skips:
        return None
    return (
        f"the last {state.skipped} updates were all skipped or dropped, as many as stability.max_skips="
        f"{config.max_skips} allows; lower optimizer.learning_rate or resume from an earlier checkpoint"
    )
