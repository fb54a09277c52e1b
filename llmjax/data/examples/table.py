"""The host's half of every task, by the name of the task in the config (`task.name`)."""

from __future__ import annotations

from collections.abc import Callable

from llmjax.data.examples.contract import Examples
from llmjax.data.examples.copies import Copies
from llmjax.data.examples.documents import Documents

# From the name of a task to what makes its examples, given `data.text_field`.
EXAMPLES: dict[str, Callable[[str], Examples]] = {"language_model": Documents, "copy": Copies}
