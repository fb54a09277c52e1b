"""All tasks, by their names in the config (`task.name`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from llmjax.errors import choose
from llmjax.ranges import Unset, check_unread
from llmjax.tasks.classification import Classification
from llmjax.tasks.contract import Task
from llmjax.tasks.conversation import Conversation
from llmjax.tasks.copy import Copy
from llmjax.tasks.language_model import LanguageModel
from llmjax.tasks.masked_language_model import MaskedLanguageModel
from llmjax.tasks.preference import Preference
from llmjax.tasks.span_corruption import SpanCorruption
from llmjax.tasks.translation import Translation

# The device half of each task; `data/examples/table.py` has the host half under the same names.
TASKS: dict[str, Task] = {
    "language_model": LanguageModel(),
    "masked_language_model": MaskedLanguageModel(),
    "translation": Translation(),
    "span_corruption": SpanCorruption(),
    "conversation": Conversation(),
    "preference": Preference(),
    "copy": Copy(),
    "classification": Classification(),
}
# The sections of tasks, which have the names of the tasks, with their dataclasses.
SECTIONS: dict[str, type] = {name: task.section for name, task in TASKS.items() if task.section}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The `task` section of the config.

    name  a key of `TASKS`
    """

    name: Annotated[str, Unset("language_model")]

    def __post_init__(self) -> None:
        choose(TASKS, "task.name", self.name)


def conversation_keys(name: str, sections: Mapping[str, Any]) -> Any:
    """The section with the keys `format` and `system` of conversations: that of the task `name`, if it learns them."""
    return sections[name if TASKS[name].use == "chat" else "conversation"]


def check_all_read(name: str, sections: Mapping[str, Any]) -> None:
    """UserError where a key of another task than `name` is set, since it would have no effect."""
    for section, keys in sections.items():
        if section != name:
            check_unread(section, keys, f"task.name={name!r}", f"task.name={section}")
