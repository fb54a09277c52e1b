"""Learning-rate schedules: a linear warmup, and then the curve that `optimizer.schedule` names.

A schedule counts updates of train.tokens_per_update tokens. It takes optimizer.schedule_updates of them, or
train.num_updates where that key is 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmjax.train.optim.optimizer import OptimizerConfig

# The user is told of a jump where a resumed run changes its learning rate by more than this fraction (our choice).
JUMP = 0.01


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One value of `optimizer.schedule`.

    decay_updates  (config, updates of the schedule, updates of the warmup) -> how many updates the decay takes. It ends
                   with the last update of the schedule
    shape          (done fraction of the decay) -> how far the rate has come down, 0 at the peak and 1 at the end
    words          the verb for the decay in the sentence "the learning rate ... to 0.001 at update 400"
    """

    decay_updates: Callable[[OptimizerConfig, int, int], int]
    shape: Callable[[float], float] = lambda progress: progress
    words: str = "falls"


def _wsd_decay(config: OptimizerConfig, updates: int, warmup: int) -> int:
    return max(round(config.decay_fraction * updates), 1) if config.decay_fraction else 0


SCHEDULES = {
    "cosine": Schedule(
        lambda config, updates, warmup: updates - warmup,
        lambda progress: 0.5 - 0.5 * math.cos(math.pi * progress),
        words="falls along a cosine",
    ),
    "linear": Schedule(lambda config, updates, warmup: updates - warmup),
    "constant": Schedule(lambda config, updates, warmup: 0),
    "wsd": Schedule(_wsd_decay),
}


def schedule_length(config: OptimizerConfig, num_updates: int) -> int:
    """How many updates the schedule takes in a run of `num_updates` updates."""
    return config.schedule_updates or num_updates


def make_schedule(config: OptimizerConfig, num_updates: int) -> Callable[[float], float]:
    """A function (u) -> the learning rate of the update that ends at u, in updates from 1 on; u may be a fraction.

    In the warmup the rate is peak * u / warmup_updates. The decay reaches `final_lr_fraction` of the peak exactly at
    the last update of the schedule, and the rate stays there. Where the decay begins before the warmup ends, the lower
    of the two rates counts.
    """
    peak, final = config.learning_rate, config.final_lr_fraction
    length, decay_updates = schedule_length(config, num_updates), _decay_updates(config, num_updates)
    shape = SCHEDULES[config.schedule].shape

    def schedule(u: float) -> float:
        # The middle of an update that is smaller than train.tokens_per_update can lie before 1, so without a warmup the
        # rate must not follow u.
        rise = min(u / config.warmup_updates, 1.0) if config.warmup_updates else 1.0
        if decay_updates <= 0:
            return peak * rise
        progress = shape(min(max(1.0 - (length - u) / decay_updates, 0.0), 1.0))
        return peak * min(rise, 1.0 - (1.0 - final) * progress)

    return schedule


def describe_schedule(config: OptimizerConfig, num_updates: int) -> str:
    """What the learning rate does in a run of `num_updates` updates, in words.

    For example: rises to 0.01 over 40 updates, falls along a cosine to 0.001 at update 400.
    """
    length, decay = schedule_length(config, num_updates), _decay_updates(config, num_updates)
    peak, warmup = config.learning_rate, config.warmup_updates
    text = f"rises to {peak:g} over {warmup:,} updates" if warmup else f"{peak:g} from the first update on"
    if decay > 0:
        begins = max(length - decay, warmup)
        text += f", {SCHEDULES[config.schedule].words} "
        text += f"from update {begins + 1:,} on " if begins > max(warmup, 1) else ""
        text += f"to {config.final_lr_fraction * peak:g} at update {length:,}"
        text += " and stays there" if length < num_updates else ""
    if num_updates and (length > num_updates or warmup > num_updates or 0 < length <= warmup):
        text += f"; the run ends at {make_schedule(config, num_updates)(num_updates):g}"
    return text


def schedule_remarks(config: OptimizerConfig, num_updates: int) -> list[str]:
    """[a sentence] where the schedule cannot do what its keys say in a run of `num_updates` updates, else []."""
    length, decay = schedule_length(config, num_updates), _decay_updates(config, num_updates)
    peak, warmup, final = config.learning_rate, config.warmup_updates, config.final_lr_fraction
    if not num_updates:
        return []
    if decay > 0 and 0 <= length - decay < warmup and final < 1:
        # The rate is highest where u / warmup meets the decay 1 - (1 - final) * (u - length + decay) / decay.
        slope = (1 - final) / decay
        highest = peak / warmup * (1 + slope * (length - decay)) / (1 / warmup + slope)
        return [
            f"optimizer.decay_fraction={config.decay_fraction:g} lets the decay begin before the updates of "
            f"optimizer.warmup_updates={warmup} are over, so that the learning rate comes to {highest:.3g} instead of "
            f"optimizer.learning_rate={peak:g}; lower one of the two"
        ]
    longer = "set optimizer.schedule_updates to the length of the run that this one begins"
    if decay <= 0 and warmup > num_updates and not config.schedule_updates:
        rate = make_schedule(config, num_updates)(num_updates)
        remedy = "lower it" if config.schedule == "constant" else f"lower it, or {longer}"
        return [
            f"optimizer.warmup_updates={warmup} is more than train.num_updates={num_updates}, so that the learning "
            f"rate still rises at the end, at {rate:.3g} of optimizer.learning_rate={peak:g}; {remedy}"
        ]
    if decay <= 0 and config.schedule == "wsd":
        return [
            f"optimizer.decay_fraction={config.decay_fraction:g} leaves the decay of "
            f"optimizer.schedule={config.schedule!r} no update, so that the learning rate stays at its peak; "
            "give a fraction above 0, or set optimizer.schedule=constant"
        ]
    if decay <= 0 and config.schedule != "constant":
        return [
            f"optimizer.warmup_updates={warmup} leaves none of train.num_updates={num_updates} for the decay of "
            f"optimizer.schedule={config.schedule!r}; lower it, or {longer}"
        ]
    return []


def describe_jump(config: OptimizerConfig, num_updates: int, old_length: int, done: float) -> str:
    """A sentence for a run that goes on after `done` updates with a schedule of another length.

    It says how the learning rate jumps because of that. `old_length` is the length of the schedule until now, in
    updates. "" where the learning rate of the next update stays the same within `JUMP`.
    """
    length = schedule_length(config, num_updates)
    if length == old_length or not old_length or not num_updates:
        return ""
    before = make_schedule(dataclasses.replace(config, schedule_updates=0), old_length)(done + 1)
    after = make_schedule(config, num_updates)(done + 1)
    if abs(after - before) <= JUMP * max(after, before):
        return ""
    key = "optimizer.schedule_updates" if config.schedule_updates else "train.num_updates"
    return (
        f"{key}={length} stretches optimizer.schedule={config.schedule!r} from {old_length} updates, so that the "
        f"learning rate goes on at {after:.3g} and not at {before:.3g}; "
        f"set optimizer.schedule_updates={old_length} to stay on the old curve"
    )


def _decay_updates(config: OptimizerConfig, num_updates: int) -> int:
    """How many updates the decay takes in a run of `num_updates` updates; 0 or less where there is no decay."""
    length, warmup = schedule_length(config, num_updates), max(config.warmup_updates, 1)
    return SCHEDULES[config.schedule].decay_updates(config, length, warmup)
