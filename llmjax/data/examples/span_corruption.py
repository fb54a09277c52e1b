"""Examples for span corruption (T5: Raffel et al. 2020, section 3.1.4): a text with gaps, and what belongs into them.

How many tokens and spans are taken out of a text depends on its length alone, as in the published code. So both streams
of an example have lengths that no draw changes, and the plan of packing holds for every epoch. What is stored is the
text with all of its gaps at the end; `tasks/span_corruption.py` draws where they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from llmjax.data.examples.contract import Example
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError


class Corruption(NamedTuple):
    """What is taken out of a text: the number of tokens, and the number of spans that they lie in."""

    tokens: int
    spans: int


def corruption_of(length: int, rate: float, span_len: float) -> Corruption:
    """The corruption of a text of this many tokens. A text of one token keeps it.

    rate      the share of the tokens that are taken out
    span_len  the mean length of a span, in tokens
    """
    if length < 2:
        return Corruption(0, 0)
    taken = min(max(round(length * rate), 1), length - 1)
    # Every span is followed or preceded by a token that stays.
    return Corruption(taken, min(max(round(taken / span_len), 1), taken, length - taken))


def stream_lengths(length: int, rate: float, span_len: float) -> tuple[int, int]:
    """The source tokens and the target positions of a text of this many tokens: each has a sentinel for every span,
    and the end."""
    taken, spans = corruption_of(length, rate, span_len)
    return length - taken + spans + 1, taken + spans + 1


@dataclasses.dataclass(frozen=True)
class SpanCorruptions:
    """Examples with the source `kept tokens, sentinels, eos` and the targets `bos, sentinels, taken tokens, eos`.

    A text that is too long for a row, or would need more sentinels than there are, is cut into parts of nearly equal
    lengths, each an example of its own. Sentinels are reserved ids of the tokenizer, the last of them first, as T5 has
    them: <extra_id_0> is its last id.

    text_field  the field of a record that holds its text
    rate        the share of the tokens that are taken out
    span_len    the mean length of a span, in tokens
    sentinels   the number of sentinels
    seq_len     T, the target positions of a row
    source_len  S, the source positions of a row
    """

    text_field: str
    rate: float
    span_len: float
    sentinels: int
    seq_len: int
    source_len: int
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("source",)

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    @functools.cached_property
    def longest(self) -> int:
        """The most tokens of a part."""
        longest = 1
        while self._fits(longest + 1):
            longest += 1
        if not corruption_of(longest, self.rate, self.span_len).spans:
            raise UserError(
                f"data.seq_len={self.seq_len} and data.source_len={self.source_len} with span_corruption.sentinels="
                f"{self.sentinels} leave room for texts of {longest} token{'s'[: longest != 1]}, of which no span is "
                "taken out; raise them"
            )
        return longest

    def _fits(self, length: int) -> bool:
        source, target = stream_lengths(length, self.rate, self.span_len)
        spans = corruption_of(length, self.rate, self.span_len).spans
        return source <= self.source_len and target <= self.seq_len and spans <= self.sentinels

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        """The only example of a short record."""
        (example,) = self.encode_several(record, tokenizer)
        return example

    def encode_several(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> list[Example]:
        """The examples of all parts of the text."""
        if len(tokenizer.reserved_ids) < self.sentinels:
            raise UserError(
                f"span_corruption.sentinels={self.sentinels} needs as many reserved ids, and the tokenizer has "
                f"{len(tokenizer.reserved_ids)}; raise tokenizer.num_reserved of one that is trained here, or lower "
                "span_corruption.sentinels"
            )
        sentinels = tokenizer.reserved_ids[: self.sentinels][::-1]
        ids = tokenizer.encode(str(record[self.text_field]))
        parts = max(-(-len(ids) // self.longest), 1)
        examples = []
        for i in range(parts):
            part = ids[len(ids) * i // parts : len(ids) * (i + 1) // parts]
            taken, spans = corruption_of(len(part), self.rate, self.span_len)
            kept, own = len(part) - taken, sentinels[:spans]
            tokens = [tokenizer.bos_id, *own, *part[kept:], tokenizer.eos_id]
            examples.append(Example(tokens, source=[*part[:kept], *own, tokenizer.eos_id]))
        return examples
