"""All tasks, by their names in the config (`task.name`)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.errors import choose
from llmjax.ranges import Unset
from llmjax.tasks.contract import Task
from llmjax.tasks.copy import Copy
from llmjax.tasks.language_model import LanguageModel

# The device half of each task; `data/examples/table.py` has the host half under the same names.
TASKS: dict[str, Task] = {"language_model": LanguageModel(), "copy": Copy()}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The `task` section of the config.

    name  a key of `TASKS`
    """

    name: Annotated[str, Unset("language_model")]

    def __post_init__(self) -> None:
        choose(TASKS, "task.name", self.name)
