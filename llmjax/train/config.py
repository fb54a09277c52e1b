"""The `train` section of the config."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.errors import choose
from llmjax.ranges import COUNT, FOLD, Range, check_ranges
from llmjax.train.update.engines import ENGINES
from llmjax.train.update.fused import MANUAL


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, and in which portions.

    num_updates         optimizer updates of the whole run
    tokens_per_update   sequences x seq_len x micro-steps, padding included
    batch_schedule      constant, or tokens per update as tokens are seen: piecewise or linear, see
                        `batch.BatchSchedule`
    batch_points        of the schedule, `TOKENS_SEEN:TOKENS_PER_UPDATE`
    micro_batch_size    sequences per micro-step over all devices; 0 = follows from accumulation_steps
    accumulation_steps  micro-steps per update; 0 = follows from micro_batch_size
    accumulation        the engine of gradient accumulation: in_place, multisteps or fused, see `engines`
    fused_gather        when fused gathers weights over mesh.fsdp: in each micro_step, or once an update, which holds
                        them and their gradients whole
    z_loss              weight of log(Z)^2 in what gradients are of (de Brebisson and Vincent 2016; PaLM)
    statistics_every    updates between statistics of each layer; 0 = never

    The run ends after num_updates x tokens_per_update tokens. Where the batch varies, schedules and cadences count
    tokens_per_update tokens as one update.
    """

    num_updates: Annotated[int, Range(0, COUNT)]
    tokens_per_update: Annotated[int, Range(1, FOLD)]
    micro_batch_size: Annotated[int, Range(1, COUNT, "what follows from accumulation_steps")]
    accumulation_steps: Annotated[int, Range(1, COUNT, "what follows from micro_batch_size")]
    z_loss: Annotated[float, Range(0, 1e3)]
    batch_schedule: str = "constant"
    batch_points: tuple[str, ...] = ()
    accumulation: str = "in_place"
    fused_gather: str = "micro_step"
    statistics_every: Annotated[int, Range(1, COUNT, "never")] = 0

    def __post_init__(self):
        check_ranges("train", self)
        choose(ENGINES, "train.accumulation", self.accumulation)
        choose(MANUAL, "train.fused_gather", self.fused_gather)
