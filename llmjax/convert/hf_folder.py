"""A folder as `transformers` saves a model: config.json, safetensors files, and a tokenizer."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from llmjax.convert.architectures.contract import START, Architecture
from llmjax.convert.config_keys import (
    TOKEN_IDS,
    architecture_of,
    choose_architecture,
    not_read,
    read_settings,
    vocab_size_of,
    write_config,
)
from llmjax.convert.files.json_file import read_object
from llmjax.convert.files.safetensors_folder import open_tensors, write_tensors
from llmjax.convert.params import WRITTEN, Note, sizes, write_params
from llmjax.convert.places import places_of
from llmjax.convert.source import Source, check_layers
from llmjax.errors import UserError, choose
from llmjax.files import write_atomically
from llmjax.types import Params

CONFIG = "config.json"
# The files of tokenizers that are read here; the first that is there counts. vocab.json is read with merges.txt.
TOKENIZERS = ("tokenizer.model", "spiece.model", "tokenizer.json", "vocab.json", "vocab.txt")


def is_model_folder(path: pathlib.Path) -> bool:
    """Whether `path` is a folder of `transformers`, and not one of ours, which has a config.json of its own."""
    if not (path / CONFIG).is_file() or os.path.lexists(path / "checkpoints"):
        return False
    try:
        config = read_object(path / CONFIG)
    except UserError:
        return False
    return "model_type" in config or "architectures" in config


def tokenizer_in(folder: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer of the model in `folder`: a file, or the folder for two files. None if there is none."""
    found = next((name for name in TOKENIZERS if (folder / name).is_file()), None)
    if found == "vocab.json":
        return folder if (folder / "merges.txt").is_file() else None
    return folder / found if found else None


def open_model(folder: pathlib.Path) -> Source:
    """The model in `folder`; its tensors are not read. Raises UserError, in one sentence, for what is wrong with it."""
    config = read_object(folder / CONFIG)
    architecture = architecture_of(config)
    settings, tensors = read_settings(architecture, config), open_tensors(folder, architecture.skips)
    if architecture.scales_tied and tensors and not settings["encoder_decoder.scale_output"]:
        # Without a scale, only the tensors say whether there is an output matrix besides the embedding.
        settings["model.tie_embeddings"] = architecture.output not in tensors
    for key in ("model.num_layers", "encoder_decoder.encoder_layers"):
        check_layers(folder, settings.get(key, 0), tensors)
    return Source(
        folder,
        architecture,
        settings,
        vocab_size_of(config),
        tensors,
        tokenizer_in(folder),
        tuple(not_read(architecture, config)),
        {name: config.get(name) for name in (*TOKEN_IDS, *([START] if architecture.encoder else []))},
    )


@dataclasses.dataclass(frozen=True)
class Export:
    """A model that is to be written as a folder of `transformers`.

    settings    our keys for it, as in `Source`
    vocab_size  the number of ids that it knows
    ids         the ids of `config_keys.TOKEN_IDS`
    dtype       the type of its weights, a key of `params.WRITTEN`
    """

    settings: Mapping[str, Any]
    vocab_size: int
    ids: Mapping[str, Any]
    dtype: str

    @property
    def architecture(self) -> Architecture:
        """The name table for it. UserError if there is none."""
        return choose_architecture(self.settings)

    def check(self, shapes: Params) -> None:
        """UserError if transformers has no such model; nothing is written."""
        choose(WRITTEN, "--dtype", self.dtype)
        write_config(self.architecture, self.settings, self.vocab_size, self.ids, self.dtype)
        places_of(self.architecture, shapes)

    def write(self, folder: pathlib.Path, params: Params, note: Note = lambda name, digest: None) -> None:
        """Writes config.json, generation_config.json and the weights into an empty folder."""
        places = places_of(self.architecture, params)
        tensors = write_params(places, params, self.dtype, note)
        write_tensors(folder, sizes(places, self.dtype), tensors)
        config = write_config(self.architecture, self.settings, self.vocab_size, self.ids, self.dtype)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        write_atomically(
            folder / "generation_config.json",
            json.dumps({name: config[name] for name in (*TOKEN_IDS, START) if name in config}, indent=2)
            + "\n",
        )
