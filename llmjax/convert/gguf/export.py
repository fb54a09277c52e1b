"""A model of ours as a GGUF file for llama.cpp, with its tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llmjax.convert.architectures.gguf import FAMILIES, ROPE_FACTORS
from llmjax.convert.config_keys import TOKEN_IDS, choose_architecture, write_config
from llmjax.convert.gguf.facts import write_facts
from llmjax.convert.gguf.rope_factors import make_factors
from llmjax.convert.gguf.writing import WRITTEN, type_of, write_file
from llmjax.convert.params import Note, digest, write_params
from llmjax.convert.places import Place, places_of
from llmjax.errors import choose
from llmjax.types import Params

FILE = "model.gguf"


@dataclasses.dataclass(frozen=True)
class Export:
    """A model that is to be written as a GGUF file.

    settings    our keys for it, as in `Source`
    vocab_size  the number of ids that it knows
    dtype       the type of its matrices, a key of `writing.WRITTEN`
    others      facts about its name, its tokenizer and its chat template
    """

    settings: Mapping[str, Any]
    vocab_size: int
    dtype: str
    others: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The name of the first family that can hold the model. UserError if there is none."""
        tables = {name: family.theirs for name, family in FAMILIES.items()}
        theirs = choose_architecture(self.settings, tables, "GGUF files")
        return next(name for name, family in FAMILIES.items() if family.theirs is theirs)

    def facts(self) -> dict[str, Any]:
        """All facts of the file. UserError for what it cannot say."""
        name, written = self.family, choose(WRITTEN, "--dtype", self.dtype)
        config = write_config(
            FAMILIES[name].theirs, self.settings, self.vocab_size, dict.fromkeys(TOKEN_IDS, 0), self.dtype
        )
        facts = write_facts(name, config, "the file")
        facts |= {"general.type": "model", "general.file_type": written.code}
        if self.dtype == "q8_0":
            facts["general.quantization_version"] = 2
        return {**facts, **self.others}

    def places(self, shapes: Params) -> dict[str, Place]:
        """The place of each tensor of ours in the file."""
        return places_of(FAMILIES[self.family].tensors, shapes)

    def types(self, shapes: Params) -> dict[str, str]:
        """The type of each tensor in the file, but for the factors of rotary positions."""
        return {name: type_of(place.shape, self.dtype) for name, place in self.places(shapes).items()}

    def check(self, shapes: Params) -> None:
        """UserError if llama.cpp has no such model; nothing is written."""
        self.facts()
        self.types(shapes)

    def write(self, folder: pathlib.Path, params: Params, note: Note = lambda name, digest: None) -> None:
        """Writes the file into an empty folder."""
        places, factors = self.places(params), self._factors()
        shapes = {name: array.shape for name, array in factors.items()}
        shapes |= {name: place.shape for name, place in places.items()}

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            yield from factors.items()
            yield from write_params(places, params, "float32")

        def tell(name: str, array: np.ndarray) -> None:
            note(name, digest(array))

        write_file(folder / FILE, self.facts(), shapes, self.dtype, tensors(), tell)

    def _factors(self) -> dict[str, np.ndarray]:
        """The tensor that says the scaling of rotary positions of Llama 3, or nothing."""
        settings = self.settings
        if settings["transformer.rope_scaling"] != "llama3":
            return {}
        head_dim = settings["transformer.head_dim"] or (
            settings["model.model_dim"] // settings["transformer.num_heads"]
        )
        keys = ("rope_theta", "rope_factor", "rope_original_len")
        return {ROPE_FACTORS: make_factors(head_dim, *(settings[f"transformer.{key}"] for key in keys))}
