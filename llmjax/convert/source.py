"""A model of another program, described but not yet read."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from llmjax.convert.architectures.contract import START, Architecture
from llmjax.convert.files.tensor_files import Tensors
from llmjax.convert.params import Note, read_params
from llmjax.convert.places import Matched, Place, match, places_of
from llmjax.errors import UserError
from llmjax.types import Params


def check_layers(path: pathlib.Path, num_layers: int, tensors: Tensors) -> None:
    """UserError for more layers than tensors, which is damage: not even the shapes of such a model could be made."""
    if tensors and num_layers > len(tensors):
        raise UserError(
            f"{path} should have {num_layers} layers and has {len(tensors)} tensors; it is damaged, so fetch it again"
        )


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of another program: what it is, and where its tensors lie.

    path          the folder or file, as the user gave it
    architecture  the name table of its tensors
    settings      our keys for it, {whole key: value}; `data.seq_len` is the longest text that it is made for
    vocab_size    the number of ids that it knows
    tensors       its tensors, none of them read
    tokenizer     the file or folder with its tokenizer, or None if there is none that is read here
    not_read      the keys of its config.json that no table mentions
    ids           the ids of the special tokens, by their names in config.json
    """

    path: pathlib.Path
    architecture: Architecture
    settings: Mapping[str, Any]
    vocab_size: int
    tensors: Tensors
    tokenizer: pathlib.Path | None
    not_read: tuple[str, ...] = ()
    ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def places(self, shapes: Params) -> dict[str, Place]:
        """The place of each tensor in a model of these `shapes`, by its name in the table."""
        return places_of(self.architecture, shapes)

    def match(self, places: Mapping[str, Place]) -> Matched:
        """Which tensor is which. UserError where one is missing, left over or of another shape."""
        return match(self.architecture, places, self.tensors, str(self.path))

    def check_start(self, bos_id: int) -> None:
        """UserError if what the model writes after a source does not begin with the id `bos_id` of its tokenizer."""
        start = self.ids.get(START)
        if start is not None and start != bos_id:
            raise UserError(
                f"{self.path} has {START}={start}, and its tokenizer begins a text with id {bos_id}; give the "
                "tokenizer of the model"
            )

    def remarks(self, matched: Matched, predicts_tokens: bool = True) -> list[str]:
        """Sentences about what the model has and we do not, and about what it lacks to predict tokens."""
        lacks = self.architecture.untrained if predicts_tokens else ""
        return [
            *([f"of {self.path}, {matched.remark}"] if matched.remark else []),
            *([f"{self.path} has {lacks}"] if lacks else []),
        ]

    def read(self, abstract: Params, note: Note = lambda name, digest: None) -> Params:
        """The parameters in the layout of `abstract`, see `read_params`."""
        places = self.places(abstract)
        return read_params(places, self.match(places), self.tensors, abstract, note)
