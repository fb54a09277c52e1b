"""Sections of the config for tests: the values of configs/base.py with the changes that a test gives."""

from __future__ import annotations

import typing
from typing import Any

from configs.base import get_config
from llmjax.config.schema import Config
from llmjax.nn.config import BlockConfig
from llmjax.parallel.mesh import AXES, MeshConfig
from llmjax.train.optim.optimizer import Optimizer, OptimizerConfig, make_optimizer
from llmjax.train.optim.optimizers.table import OPTIMIZERS
from llmjax.train.optim.param_roles import Roles

# The name of each section -> its dataclass.
SECTIONS = typing.get_type_hints(Config)


def section(name: str, /, **changes: Any) -> Any:
    """The section `name` of configs/base.py with `changes`."""
    return SECTIONS[name](**get_config()[name].to_dict() | changes)


def block_section(**changes: Any) -> BlockConfig:
    """The sections `model`, `transformer` and `experts` of configs/base.py as one, with `changes`."""
    raw = get_config()
    return BlockConfig(**raw.model.to_dict() | raw.transformer.to_dict() | raw.experts.to_dict() | changes)


def mesh_section(*sizes: int, **changes: Any) -> MeshConfig:
    """The section `mesh`; `sizes` are the sizes of its first axes, in the order of `AXES`."""
    return section("mesh", **dict(zip(AXES, sizes)) | changes)


def optimizer_section(name: str = "adamw", **changes: Any) -> OptimizerConfig:
    """The section `optimizer` with AdamW and a learning rate for it, unless `changes` say otherwise."""
    return section("optimizer", **{"name": name, "learning_rate": 3e-3} | changes)


def optimizer_of(
    config: OptimizerConfig,
    num_updates: int,
    roles: Roles,
    *,
    offload: bool = False,
    num_layers: int = 0,
    **own: Any,
) -> Optimizer:
    """The optimizer of `config`; `own` changes the section that has the name of the optimizer."""
    sections = {name: section(name, **(own if name == config.name else {})) for name in OPTIMIZERS}
    return make_optimizer(config, sections, num_updates, roles, offload=offload, num_layers=num_layers)
