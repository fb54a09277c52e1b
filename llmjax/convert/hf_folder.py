"""A folder as `transformers` saves a model: config.json, safetensors files, and a tokenizer."""

from __future__ import annotations

import os
import pathlib

from llmjax.convert.config_keys import architecture_of, not_read, read_settings, vocab_size_of
from llmjax.convert.files.json_file import read_object
from llmjax.convert.files.safetensors_folder import open_tensors
from llmjax.convert.source import Source
from llmjax.errors import UserError

CONFIG = "config.json"
# The file of a tokenizer that is read here. tokenizer.json is read by the package tokenizers only.
SENTENCEPIECE = "tokenizer.model"


def is_model_folder(path: pathlib.Path) -> bool:
    """Whether `path` is a folder of `transformers`, and not one of ours, which has a config.json of its own."""
    if not (path / CONFIG).is_file() or os.path.lexists(path / "checkpoints"):
        return False
    try:
        config = read_object(path / CONFIG)
    except UserError:
        return False
    return "model_type" in config or "architectures" in config


def open_model(folder: pathlib.Path) -> Source:
    """The model in `folder`; its tensors are not read. Raises UserError, in one sentence, for what is wrong with it."""
    config = read_object(folder / CONFIG)
    architecture = architecture_of(config)
    tokenizer = folder / SENTENCEPIECE
    return Source(
        folder,
        architecture,
        read_settings(architecture, config),
        vocab_size_of(config),
        open_tensors(folder),
        tokenizer if tokenizer.is_file() else None,
        tuple(not_read(architecture, config)),
    )
