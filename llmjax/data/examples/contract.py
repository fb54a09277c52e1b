"""The contract for the host half of a task: it turns a record of a source into an example of tokens, without jax."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.names import plain_name


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example, as the token store holds it.

    tokens   the token ids that are packed into rows. The model reads tokens[:-1] and predicts tokens[1:]
    weights  the loss weights of the tokens as targets: runs of (number of tokens, weight) that cover `tokens`
    source   the token ids of a second stream, which the model reads but does not predict, such as the source of a
             translation
    label    the number of a class, counted from 0
    turns    the positions in `tokens`, ascending, at which a document that is longer than a row is cut, if it can be
    """

    tokens: Sequence[int]
    weights: Sequence[tuple[int, float]] = ()
    source: Sequence[int] = ()
    label: int = 0
    turns: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class ExampleSetting:
    """What the host half of a task is made from.

    text_field    the field of a record that holds its text
    seq_len       T, the positions of a packed sequence
    keys          the task's own section of the config, if it has one
    reads_source  whether the model family reads a second stream of tokens
    source_len    S, the positions of a packed row of the second stream; 0 = seq_len
    """

    text_field: str
    seq_len: int
    keys: Any = None
    reads_source: bool = False
    source_len: int = 0


# The fields of `Example` that a store holds only for tasks that fill them.
OPTIONAL_COLUMNS = ("weights", "source", "label", "turns")


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
class Structured(Protocol):
    """A task with fields of a record that hold lists or objects of JSON. `encode` gets these as JSON text."""

    @property
    def structured(self) -> tuple[str, ...]:
        """The names of these fields."""

    def check(self, record: Mapping[str, str | int]) -> None:
        """Raises UserError for a record of which no example can be made."""


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the name of a record, which says its file and line, before an error about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{plain_name(name)}: {error}") from None


def can_be_cut(examples: Examples) -> bool:
    """Whether a document is one text, whose parts are documents as well.

    It is not if it has a label, which is of the whole text, and not if its text stands in lists or objects of JSON.
    """
    is_text = "label" not in examples.columns and not isinstance(examples, Structured)
    return is_text and len(examples.fields) == 1


@runtime_checkable
class OwnTexts(Protocol):
    """A task that encodes other texts than the first field of a record as it is. The tokenizer is trained on these."""

    @property
    def fields(self) -> tuple[str, ...]: ...

    @property
    def further_texts(self) -> tuple[str, ...]:
        """The fields besides the first one that have text, without which there is no example."""

    def texts(self, record: Mapping[str, str | int]) -> list[str]:
        """The texts of a record that are encoded."""


@runtime_checkable
class Several(Protocol):
    """A task that makes several examples of a long record, each a document of the store."""

    def encode_several(self, record: Mapping[str, str | int], tokenizer: Tokenizer) -> list[Example]:
        """Makes the examples of one record: one at least."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is given before it writes: the beginning of its stream, and its second stream, if it has one."""

    tokens: Sequence[int]
    source: Sequence[int] = ()


@runtime_checkable
class Prompting(Protocol):
    """A task whose model is given a text and writes another, instead of going on with the text."""

    def encode_prompt(self, text: str, tokenizer: Tokenizer) -> Prompt:
        """What the model is given for `text`."""


@runtime_checkable
class HeldOutBy(Protocol):
    """A task for which a part of a record decides whether the record is held out. Without it, all fields decide."""

    def decisive(self, record: Mapping[str, str | int]) -> str:
        """The text by which records are held out: those that are alike in it are on the same side."""


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
