"""Everything that decides a run, as frozen dataclasses: one for each section of a config file.

The dataclass of a section lies beside the code that reads it and has exactly the keys of the section. It has no
defaults: configs/base.py alone says what a run does that sets nothing. `LayerCompute` and `CheckpointConfig` do have
some, for models and checkpoints that are made without a config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from llmjax.data.pipeline import DataConfig
from llmjax.data.tokenizer.kinds import TokenizerConfig
from llmjax.evaluate.held_out import EvaluateConfig
from llmjax.evaluate.text_vectors import EmbedConfig
from llmjax.generate.generate import GenerateConfig
from llmjax.models.table import SECTIONS as FAMILY_SECTIONS
from llmjax.nn.config import ModelConfig
from llmjax.parallel.mesh import MeshConfig
from llmjax.ranges import FOLD, Range, check_ranges
from llmjax.serve.config import ServeConfig
from llmjax.tasks.table import SECTIONS as TASK_SECTIONS
from llmjax.tasks.table import TaskConfig
from llmjax.train.checkpoint.config import CheckpointConfig
from llmjax.train.config import ComputeConfig, TrainConfig
from llmjax.train.optim.optimizer import OptimizerConfig
from llmjax.train.optim.optimizers.table import OPTIMIZERS
from llmjax.train.steering.controller import ControllerConfig
from llmjax.train.steering.spikes import StabilityConfig
from llmjax.train.tuning.lora import LoraConfig
from llmjax.workdir.sinks.contract import MetricsConfig


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The `plan` section of the config.

    topology  the TPU to compile for, see `plan/topology.py`; "" = the devices at hand
    """

    topology: str


# Each family, task and optimizer has sections of its own, so that a key of one is no key of the others.
OWN_SECTIONS = {
    **FAMILY_SECTIONS,
    **TASK_SECTIONS,
    **{name: kind.section for name, kind in OPTIMIZERS.items()},
}

if TYPE_CHECKING:

    class OwnSections:
        """A field for each entry of `OWN_SECTIONS`. Type checkers need not know them: `Config.families`,
        `Config.tasks` and `Config.optimizers` have them."""
else:
    OwnSections = dataclasses.make_dataclass("OwnSections", OWN_SECTIONS.items(), frozen=True)


@dataclasses.dataclass(frozen=True)
class Config(OwnSections):
    """Everything that decides a run: the sections below, and those of the model families, tasks and optimizers."""

    seed: Annotated[int, Range(0, FOLD)]
    model: ModelConfig
    task: TaskConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    mesh: MeshConfig
    compute: ComputeConfig
    train: TrainConfig
    lora: LoraConfig
    optimizer: OptimizerConfig
    controller: ControllerConfig
    stability: StabilityConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    generate: GenerateConfig
    embed: EmbedConfig
    serve: ServeConfig
    plan: PlanConfig

    def __post_init__(self) -> None:
        check_ranges("", self)

    @property
    def families(self) -> Mapping[str, Any]:
        """The sections of the model families, by their names."""
        return {name: getattr(self, name) for name in FAMILY_SECTIONS}

    @property
    def tasks(self) -> Mapping[str, Any]:
        """The sections of the tasks that have one, by their names."""
        return {name: getattr(self, name) for name in TASK_SECTIONS}

    @property
    def optimizers(self) -> Mapping[str, Any]:
        """The sections of the optimizers, by their names."""
        return {name: getattr(self, name) for name in OPTIMIZERS}

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON would give them back."""
        values = dataclasses.asdict(self)
        # Readers of a config.json look for the sections of families, tasks and optimizers after all others.
        values |= {name: values.pop(name) for name in OWN_SECTIONS}
        return {
            name: {key: list(x) if isinstance(x, tuple) else x for key, x in section.items()}
            if isinstance(section, dict)
            else section
            for name, section in values.items()
        }
