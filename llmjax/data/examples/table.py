"""The host half of every task, by the name of the task in the config (`task.name`)."""

from __future__ import annotations

from collections.abc import Callable

from llmjax.data.examples.classified import Classified
from llmjax.data.examples.contract import Examples
from llmjax.data.examples.copies import Copies
from llmjax.data.examples.documents import Documents

# The name of a task -> a function of `data.text_field` that returns its `Examples`.
EXAMPLES: dict[str, Callable[[str], Examples]] = {
    "language_model": Documents,
    "masked_language_model": Documents,
    "copy": Copies,
    "classification": Classified,
}
