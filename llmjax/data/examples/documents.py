"""Examples for next-token prediction: each document is one stream of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from llmjax.data.examples.contract import Example
from llmjax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Documents:
    """Examples `[bos] text [eos]`. Every token after bos is a target of weight 1.

    text_field  the field of a record that holds its text
    """

    text_field: str
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        return self.encode_part(record, tokenizer, first=True, last=True)

    def encode_part(
        self, record: Mapping[str, str | int], tokenizer: Tokenizer, first: bool, last: bool
    ) -> Example:
        text = tokenizer.encode(str(record[self.text_field]), continues=not first)
        return Example([tokenizer.bos_id] * first + text + [tokenizer.eos_id] * last)
