"""Examples for the copy task: a document twice in a row, of which the model learns to write the second."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from llmjax.data.examples.contract import Example
from llmjax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Copies:
    """Examples `[bos] text [bos] text [eos]`. Targets have weight 0 up to the second bos, then weight 1, eos included.

    text_field  the field of a record that holds its text
    """

    text_field: str
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("weights",)

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        text = tokenizer.encode(str(record[self.text_field]))
        tokens = [tokenizer.bos_id, *text, tokenizer.bos_id, *text, tokenizer.eos_id]
        return Example(tokens, weights=((len(text) + 2, 0.0), (len(text) + 1, 1.0)))
