"""What the host decides about each update before it begins: how many micro-steps, which hyperparameters, which limits.

A decision is a pure function of the tokens seen and of what was observed up to the last update but one. The metrics of
an update are fetched while the next one runs, so the device never waits for a decision. A resumed run takes the same
decisions as one that never stopped.
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
    """What was observed up to some update. Checkpoints save it.

    controller  the averages of the controller of the batch size
    stability   the running levels of loss and gradient norm, by which spikes are found
    """

    controller: ControllerState
    stability: StabilityState

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> History:
        """The history from nested dicts of plain values, as JSON holds them."""
        return cls(
            ControllerState.from_dict(saved["controller"]), StabilityState.from_dict(saved["stability"])
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided about one update.

    inputs         what the compiled step gets
    steps          the number of micro-steps
    length         the length of the rows, in tokens
    learning_rate  for the log
    limits         loss and gradient norm above which the update counts as a spike
    reason         one sentence on why the update has this many micro-steps; empty if a schedule decides on them
    """

    inputs: UpdateInputs
    steps: int
    length: int
    learning_rate: float
    limits: Limits
    reason: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the device measured of one update.

    steps          the number of micro-steps
    weight         sum of the loss weights of the parts of the gradient, see `controller.Observation`
    weight_square  sum of their squares
    square_norm    sum of the squared gradient norms of the parts
    mean_loss      mean loss of the whole update, a float32 number
    grad_norm      norm of its mean gradient before clipping, a float32 number
    square_total   squared norm of its summed gradient, a float32 number
    applied        whether the parameters were changed
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
    """The rules by which a run decides about its updates.

    schedule              the tokens per update; the controller overrides it unless controller.name is none
    lengths               the length of rows
    optimizer             computes the hyperparameters of an update
    controller            the config of the controller of the batch size
    stability             the config of the search for spikes
    tokens_per_update     train.tokens_per_update, the unit in which learning rate schedules count
    num_tokens            the tokens after which the run ends. The last update gets fewer micro-steps to end there
    parts_per_micro_step  how many gradients of a micro-step are measured apart, see `controller.Observation`
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
        """The largest number of micro-steps that any decision can have."""
        chosen = RULES[self.controller.name].decides
        return self.controller.k_max if chosen else self.schedule.max_steps

    def start(self) -> History:
        """The history of a new run, which has observed nothing yet."""
        state = controller.initial_state(self.controller, self.schedule.accumulation_steps(0))
        return History(state, StabilityState())

    def decide(self, history: History, tokens: int, steps: int = 0) -> Decision:
        """Decides about the update that begins after `tokens` tokens.

        `steps` is 0 for a new update. For an update that was interrupted and is resumed, it is the number of
        micro-steps that was decided on when the update began.
        """
        # The controller has decided already, when it observed the last update. A schedule is asked now.
        if RULES[self.controller.name].decides:
            wanted, reason = history.controller.k, history.controller.reason
        else:
            wanted, reason = self.schedule.accumulation_steps(tokens), ""
        # The last update has no more micro-steps than it takes to reach num_tokens.
        left = max(math.ceil((self.num_tokens - tokens) / self.schedule.micro_tokens), 1)
        steps = steps or min(wanted, left)
        if reason and steps < wanted:
            reason = f"the run ends after {steps} more"
        # Learning rate schedules count in updates of the configured size, whatever sizes the updates really have.
        size = steps * self.schedule.micro_tokens / self.tokens_per_update
        hyper = self.optimizer.hyperparameters(tokens / self.tokens_per_update, size)
        limits = spikes.limits(self.stability, history.stability)
        # The host always looks for spikes. The device needs limits only if it is to skip updates.
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
        """Returns the history with one more update, and the spike if the update was one, else None.

        `decision` is what was decided about the update, `measured` what the device measured of it.
        """
        # Positions, padding included, whatever their loss weights.
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
