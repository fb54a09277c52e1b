"""Models of other programs that a run may begin with as they are: a folder of `transformers`, or a GGUF file."""

from __future__ import annotations

import pathlib

from llmjax.convert import hf_folder
from llmjax.convert.gguf import model as gguf_file
from llmjax.convert.source import Source
from llmjax.gguf.header import is_gguf


def is_foreign(path: pathlib.Path) -> bool:
    """Whether `path` is such a model."""
    return is_gguf(path) or hf_folder.is_model_folder(path)


def open_foreign(path: pathlib.Path) -> Source:
    """The model at `path`; its tensors are not read. Raises UserError, in one sentence, for what is wrong with it."""
    return gguf_file.open_model(path) if is_gguf(path) else hf_folder.open_model(path)


def tokenizer_of(path: pathlib.Path) -> pathlib.Path | None:
    """What `load_tokenizer` reads the tokenizer of the model from, or None if it brings none."""
    return path if is_gguf(path) else hf_folder.tokenizer_in(path)
