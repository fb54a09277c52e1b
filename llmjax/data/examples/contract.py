"""What a task is on the host's side: it turns a record of a source into an example of tokens. No jax is needed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from llmjax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example, as the token store keeps it.

    tokens   the stream that is packed into rows. The model reads tokens[:-1] and predicts tokens[1:]
    weights  loss weights of the tokens as targets, as runs of (number of tokens, weight) that cover `tokens`
    source   a second stream of tokens, which the model reads and does not predict: the source of a translation
    label    a class number
    """

    tokens: Sequence[int]
    weights: Sequence[tuple[int, float]] = ()
    source: Sequence[int] = ()
    label: int = 0


# What a store can hold of an example besides its tokens.
OPTIONAL_COLUMNS = ("weights", "source", "label")


class Examples(Protocol):
    """The host's half of a task: a frozen dataclass, whose `repr` tells it apart from others.

    Worker processes call `encode`, so that it must be picklable and import no jax. The stores of a task are built
    again when its `repr` or its `version` changes.
    """

    @property
    def version(self) -> int:
        """Is raised by hand whenever `encode` gives another example for the same record."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that `encode` reads. The first one is the text of the document."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of `OPTIONAL_COLUMNS` that the examples fill."""

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        """The example of one record, which has all `fields`."""


@runtime_checkable
class InParts(Protocol):
    """A task of one field and no optional column that can encode a long document part by part, so that no process ever
    holds the whole. Other tasks are given every document whole."""

    def encode_part(
        self, record: Mapping[str, str | int], tokenizer: Tokenizer, first: bool, last: bool
    ) -> Example:
        """The example of a part of a document, one of the tokenizer's `pieces`. `first` and `last` say whether the
        document begins and ends with it; the parts' tokens, joined, are those of `encode`."""
