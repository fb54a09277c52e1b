"""What the host decides about each update before it begins: how many micro-steps, which hyperparameters, which limits.

A decision is a pure function of the tokens seen and of what was observed up to the last update but one. The
device never waits for a decision, since metrics are fetched one update late anyway, and a resumed run decides
as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from llmjax.train.optim.optimizer import Optimizer
from llmjax.train.steering import controller, spikes
from llmjax.train.steering.batch_schedule import BatchSchedule
from llmjax.train.steering.controller import RULES, ControllerConfig, ControllerState, Observation
from llmjax.train.steering.length_schedule import LengthSchedule
from llmjax.train.steering.spikes import Limits, Spike, StabilityConfig, StabilityState
from llmjax.train.update.accumulate import UpdateInputs


@dataclasses.dataclass(frozen=True)
class History:
    """What was observed up to some update."""

    controller: ControllerState
    stability: StabilityState

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> History:
        """The history of nested plain values."""
        return cls(
            ControllerState.from_dict(saved["controller"]), StabilityState.from_dict(saved["stability"])
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """The inputs of one update, with what the host keeps of it: k, why, the length of rows, a spike's limits."""

    inputs: UpdateInputs
    steps: int
    length: int
    learning_rate: float
    limits: Limits
    reason: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """One update as the device saw it: sums over its micro-steps, and the numbers of its end.

    steps                      micro-steps
    weight, weight_square, square_norm  summed over the parts of the gradient, see `controller.Observation`
    mean_loss, grad_norm, square_total  of the whole update; float32 numbers
    applied                    whether the parameters moved
    """

    steps: int
    weight: float
    weight_square: float
    square_norm: float
    mean_loss: float
    grad_norm: float
    square_total: float
    applied: bool


@dataclasses.dataclass(frozen=True)
class Steering:
    """A run's rules.

    tokens_per_update     of train.tokens_per_update: the unit of schedules
    num_tokens            at which the run ends; its last update is cut so that it ends there
    parts_per_micro_step  how many gradients of their own a micro-step shows
    """

    schedule: BatchSchedule
    lengths: LengthSchedule
    optimizer: Optimizer
    controller: ControllerConfig
    stability: StabilityConfig
    tokens_per_update: int
    num_tokens: int
    parts_per_micro_step: int = 1

    @property
    def max_steps(self) -> int:
        """The largest k that any decision can have."""
        chosen = RULES[self.controller.name].decides
        return self.controller.k_max if chosen else self.schedule.max_steps

    def start(self) -> History:
        """The history of a run that has none."""
        state = controller.initial_state(self.controller, self.schedule.accumulation_steps(0))
        return History(state, StabilityState())

    def decide(self, history: History, tokens: int, steps: int = 0) -> Decision:
        """The update that begins after `tokens`; `steps` is given where it has begun already."""
        if RULES[self.controller.name].decides:
            wanted, reason = history.controller.k, history.controller.reason
        else:
            wanted, reason = self.schedule.accumulation_steps(tokens), ""
        left = max(math.ceil((self.num_tokens - tokens) / self.schedule.micro_tokens), 1)
        steps = steps or min(wanted, left)
        if reason and steps < wanted:
            reason = f"the run ends after {steps} more"
        size = steps * self.schedule.micro_tokens / self.tokens_per_update
        hyper = self.optimizer.hyperparameters(tokens / self.tokens_per_update, size)
        limits = spikes.limits(self.stability, history.stability)
        on_device = spikes.device_limits(self.stability, limits)
        inputs = UpdateInputs(
            np.int32(steps),
            jax.tree.map(np.float32, hyper),
            np.float32(on_device.loss),
            np.float32(on_device.grad_norm),
        )
        return Decision(
            inputs, steps, self.lengths.length(tokens), float(hyper.learning_rate), limits, reason
        )

    def observe(
        self, history: History, decision: Decision, measured: Measured
    ) -> tuple[History, Spike | None]:
        """The history with one more update, and the spike that it was."""
        tokens = measured.steps * self.schedule.micro_tokens
        observation = Observation(
            tokens=tokens,
            weight=measured.weight,
            weight_square_parts=measured.weight_square,
            square_parts=measured.square_norm,
            square_total=measured.square_total,
            num_parts=measured.steps * self.parts_per_micro_step,
        )
        controlled = controller.observe(
            self.controller, history.controller, observation, self.schedule.micro_tokens
        )
        stable, spike = spikes.observe(
            self.stability,
            history.stability,
            decision.limits,
            tokens,
            measured.mean_loss,
            measured.grad_norm,
            measured.applied,
        )
        return History(controlled, stable), spike
