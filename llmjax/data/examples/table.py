"""The host half of every task, by the name of the task in the config (`task.name`)."""

from __future__ import annotations

from collections.abc import Callable

from llmjax.data.examples.classified import make_classified
from llmjax.data.examples.contract import Examples, ExampleSetting
from llmjax.data.examples.conversations import Conversations
from llmjax.data.examples.copies import Copies
from llmjax.data.examples.documents import Documents
from llmjax.data.examples.preferences import Preferences
from llmjax.data.examples.span_corruption import SpanCorruptions
from llmjax.data.examples.translations import Translations

# The name of a task -> a function that returns its `Examples`.
EXAMPLES: dict[str, Callable[[ExampleSetting], Examples]] = {
    "language_model": lambda setting: Documents(setting.text_field),
    "masked_language_model": lambda setting: Documents(setting.text_field),
    "translation": lambda setting: Translations(
        setting.keys.source_field, setting.text_field, setting.reads_source
    ),
    "span_corruption": lambda setting: SpanCorruptions(
        setting.text_field,
        setting.keys.rate,
        setting.keys.span_len,
        setting.keys.sentinels,
        setting.seq_len,
        setting.source_len or setting.seq_len,
    ),
    "conversation": lambda setting: Conversations(
        setting.text_field, setting.keys.format, setting.keys.system
    ),
    "preference": lambda setting: Preferences(
        setting.text_field,
        setting.keys.rejected_field,
        setting.keys.prompt_field,
        setting.keys.format,
        setting.keys.system,
    ),
    "classification": make_classified,
    "copy": lambda setting: Copies(setting.text_field),
}
