"""Examples for translation: a text, the source, and the text that the model learns to write after reading it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from llmjax.data.examples.contract import Example, Prompt
from llmjax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Translations:
    """For a family that reads a second stream, the source is that stream, and the targets are `[bos] text [eos]`.

    For other families both texts are one stream, `[bos] source [bos] text [eos]`, whose targets have weight 0 up to the
    second bos.

    source_field  the field of a record that holds the source
    text_field    the field that holds its translation
    two_streams   whether the source is a stream of its own
    """

    source_field: str
    text_field: str
    two_streams: bool
    version: ClassVar[int] = 2

    @property
    def columns(self) -> tuple[str, ...]:
        return ("source",) if self.two_streams else ("weights",)

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field, self.source_field)

    @property
    def further_texts(self) -> tuple[str, ...]:
        return (self.source_field,)

    def texts(self, record: Mapping[str, str | int]) -> list[str]:
        return [str(record[field]) for field in self.fields]

    def decisive(self, record: Mapping[str, str | int]) -> str:
        """A source has several translations at times, and the model has seen it if it was trained on one of them."""
        return str(record[self.source_field])

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        prompt = self.encode_prompt(str(record[self.source_field]), tokenizer)
        text = tokenizer.encode(str(record[self.text_field]))
        tokens = [*prompt.tokens, *text, tokenizer.eos_id]
        if self.two_streams:
            return Example(tokens, source=prompt.source)
        return Example(tokens, weights=((len(prompt.tokens), 0.0), (len(text) + 1, 1.0)))

    def encode_prompt(self, text: str, tokenizer: Tokenizer) -> Prompt:
        ids = tokenizer.encode(text)
        if self.two_streams:
            return Prompt([tokenizer.bos_id], source=[*ids, tokenizer.eos_id])
        return Prompt([tokenizer.bos_id, *ids, tokenizer.bos_id])
