"""The tasks there are, by their names in the config (`task.name`)."""

from __future__ import annotations

import dataclasses

from llmjax.errors import choose
from llmjax.tasks.contract import Task
from llmjax.tasks.language_model import LanguageModel

TASKS: dict[str, Task] = {"language_model": LanguageModel()}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The `task` section of the config: `name` is one of `TASKS`."""

    name: str = "language_model"

    def __post_init__(self) -> None:
        choose(TASKS, "task.name", self.name)
