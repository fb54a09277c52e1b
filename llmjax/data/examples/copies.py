"""Examples for the copy task: a document, and the same document once more, which is what the model learns to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from llmjax.data.examples.contract import Example
from llmjax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Copies:
    """`[bos] text [bos] text [eos]`: weight 0 up to the second bos, weight 1 on the copy and on eos."""

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
