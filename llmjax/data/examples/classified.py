"""Examples for classification: a text and the number of its label."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from llmjax.data.examples.contract import Example, ExampleSetting
from llmjax.data.sources.records import FILE, FOLDER
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError

# classification.label_from -> the field of a record that has the label, if it is not classification.label_field.
PLACES = {"file": FILE, "folder": FOLDER}


@dataclasses.dataclass(frozen=True)
class Classified:
    """Examples `[bos] text [eos]` with a label. Only the last target has weight: the model has read the text by then.

    text_field   the field of a record that holds its text
    label_field  the field that holds its label
    labels       all labels; an example has the number of its own
    max_tokens   a longer example is cut at its end, and then has no eos
    """

    text_field: str
    label_field: str
    labels: tuple[str, ...]
    max_tokens: int
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("weights", "label")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field, self.label_field)

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        label = str(record[self.label_field])
        if label not in self.labels:
            raise UserError(
                f"the label {label!r} is not one of classification.labels={self.labels}; correct it, or name it there"
            )
        tokens = [tokenizer.bos_id, *tokenizer.encode(str(record[self.text_field])), tokenizer.eos_id]
        tokens = tokens[: self.max_tokens]
        return Example(tokens, ((len(tokens) - 1, 0.0), (1, 1.0)), label=self.labels.index(label))


def make_classified(setting: ExampleSetting) -> Classified:
    """The examples as the section `classification` asks for them, cut to fit into a row."""
    keys = setting.keys
    field = PLACES.get(keys.label_from, keys.label_field)
    # A row of T positions reads T tokens and has one more as its last target.
    return Classified(setting.text_field, field, keys.labels, setting.seq_len + 1)
