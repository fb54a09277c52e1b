"""Everything that decides a run, as frozen dataclasses: one for each section of a config file.

Each section lives beside its owner and has the same keys as the section of the file, no more and no fewer. So a key
that nobody reads cannot be set.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from llmjax.data.pipeline import DataConfig
from llmjax.data.tokenizer.tokenizer import TokenizerConfig
from llmjax.evaluate.held_out import EvaluateConfig
from llmjax.generate.generate import GenerateConfig
from llmjax.nn.config import ModelConfig
from llmjax.parallel.mesh import MeshConfig
from llmjax.ranges import FOLD, Range, check_ranges
from llmjax.tasks.table import TaskConfig
from llmjax.train.checkpoint.checkpoint import CheckpointConfig
from llmjax.train.config import ComputeConfig, TrainConfig
from llmjax.train.optim.optimizer import OptimizerConfig
from llmjax.train.steering.controller import ControllerConfig
from llmjax.train.steering.spikes import StabilityConfig


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The `plan` section: `topology` names a TPU to compile for (see plan/topology); "" means the devices at hand."""

    topology: str


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    seed: Annotated[int, Range(0, FOLD)]
    model: ModelConfig
    task: TaskConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    mesh: MeshConfig
    compute: ComputeConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    controller: ControllerConfig
    stability: StabilityConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    generate: GenerateConfig
    plan: PlanConfig

    def __post_init__(self) -> None:
        check_ranges("", self)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON would give them back."""
        sections = dataclasses.asdict(self)
        return {
            name: {key: list(x) if isinstance(x, tuple) else x for key, x in section.items()}
            if isinstance(section, dict)
            else section
            for name, section in sections.items()
        }
