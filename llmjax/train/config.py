"""The sections `train` and `compute` of the config: what is trained for how long, and how the work is cut."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.errors import choose
from llmjax.nn.layer_compute import LayerCompute
from llmjax.ranges import COUNT, FOLD, Range, Unset, check_ranges
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
    z_loss              weight of log(Z)^2 in what gradients are of (de Brebisson and Vincent 2016; PaLM)
    statistics_every    updates between statistics of each layer; 0 = never
    patience            the run ends after as many evaluations in a row without a better score; 0 = never
    frozen              parameters that do not train, by their names, see `tuning/names.py`; NAME:N freezes the first N
                        layers of a stack

    The run ends after num_updates x tokens_per_update tokens. Where the batch varies, schedules and cadences count
    tokens_per_update tokens as one update.
    """

    num_updates: Annotated[int, Range(0, COUNT)]
    tokens_per_update: Annotated[int, Range(1, FOLD)]
    z_loss: Annotated[float, Range(0, 1e3)]
    batch_schedule: Annotated[str, Unset("constant")]
    batch_points: Annotated[tuple[str, ...], Unset(())]
    statistics_every: Annotated[int, Range(1, COUNT, "never"), Unset(0)]
    patience: Annotated[int, Range(1, COUNT, "never"), Unset(0)]
    frozen: Annotated[tuple[str, ...], Unset(())]

    def __post_init__(self):
        check_ranges("train", self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig(LayerCompute):
    """How the work is cut and where things lie: no key of this section, nor of `mesh`, changes the loss curve.

    micro_batch_size    sequences per micro-step over all devices; 0 = follows from accumulation_steps
    accumulation_steps  micro-steps per update; 0 = follows from micro_batch_size
    engine              of gradient accumulation: in_place, multisteps or fused, see `update/engines.py`
    gather              when the engine fused gathers weights over mesh.fsdp: in each micro_step, or once an update,
                        which holds them and their gradients whole
    offload_optimizer   the optimizer's state lies in the memory of the hosts between updates
    compilation_cache_mb  megabytes of disk for compiled programs, see `build/compiled_programs.py`; 0 = none

    The others are those of `LayerCompute`.
    """

    micro_batch_size: Annotated[int, Range(1, COUNT, "what follows from accumulation_steps")]
    accumulation_steps: Annotated[int, Range(1, COUNT, "what follows from micro_batch_size")]
    engine: Annotated[str, Unset("in_place")]
    gather: Annotated[str, Unset("micro_step")]
    offload_optimizer: Annotated[bool, Unset(False)]
    compilation_cache_mb: Annotated[int, Range(1, COUNT, "none"), Unset(0)]

    def __post_init__(self) -> None:
        check_ranges("compute", self)
        choose(ENGINES, "compute.engine", self.engine)
        choose(MANUAL, "compute.gather", self.gather)
        super().__post_init__()
