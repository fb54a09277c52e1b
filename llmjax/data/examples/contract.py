"""The contract for the host half of a task: it turns a record of a source into an example of tokens, without jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from llmjax.data.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example, as the token store holds it.

    tokens   the token ids that are packed into rows. The model reads tokens[:-1] and predicts tokens[1:]
    weights  the loss weights of the tokens as targets: runs of (number of tokens, weight) that cover `tokens`
    source   the token ids of a second stream, which the model reads but does not predict, such as the source of a
             translation
    label    the number of a class, counted from 0
    """

    tokens: Sequence[int]
    weights: Sequence[tuple[int, float]] = ()
    source: Sequence[int] = ()
    label: int = 0


# The fields of `Example` that a store holds only for tasks that fill them.
OPTIONAL_COLUMNS = ("weights", "source", "label")


class Examples(Protocol):
    """The host half of a task: a frozen dataclass that makes an example of each record.

    Worker processes call `encode`, so instances must be picklable and must not import jax. Cached stores are found by
    the `repr` of the instance and its `version`: if either changes, the store is built again.
    """

    @property
    def version(self) -> int:
        """A number to raise by hand whenever `encode` gives another example for the same record."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields of a record that `encode` reads. The first field is the text of the document."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in `OPTIONAL_COLUMNS` that the examples fill."""

    def encode(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> Example:
        """Makes the example of one record, which has all `fields`."""


@runtime_checkable
class Settled(Protocol):
    """Examples that depend on more keys of the config than `data.text_field`."""

    def settled(self, keys: Any, seq_len: int) -> Examples:
        """These examples as `keys`, the section of the task, and data.seq_len ask for them."""


@runtime_checkable
class InParts(Protocol):
    """A task of one field and no optional column that can encode a long document part by part.

    No process then ever holds the whole document. Other tasks are given every document whole.
    """

    def encode_part(
        self, record: Mapping[str, str | int], tokenizer: Tokenizer, first: bool, last: bool
    ) -> Example:
        """Makes the example of a part of a document, one of the tokenizer's `pieces`.

        `first` and `last` say whether the document begins and ends with this part. The tokens of all parts, joined, are
        those of `encode`.
        """
