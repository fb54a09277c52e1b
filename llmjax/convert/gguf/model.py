"""A model in a GGUF file, the format of llama.cpp, with the tokenizer that the file holds as well."""

from __future__ import annotations

import pathlib

from llmjax.convert.architectures.gguf import ROPE_FACTORS
from llmjax.convert.config_keys import read_settings
from llmjax.convert.gguf.facts import IDS, family_of, not_read, read_config
from llmjax.convert.gguf.rope_factors import read_factors
from llmjax.convert.gguf.tensors import open_tensors
from llmjax.convert.source import Source, check_layers
from llmjax.errors import UserError
from llmjax.gguf.header import read_header

EMBEDDING = "token_embd.weight"


def open_model(path: pathlib.Path) -> Source:
    """The model in the file `path`; its tensors are not read. Raises UserError, in one sentence, if it is none."""
    if not path.is_file():
        raise UserError(f"{path} is no file; give a GGUF file")
    header = read_header(path)
    name, family = family_of(header.facts, str(path))
    config = read_config(name, family, header.facts, str(path))
    tensors = open_tensors(path, header)
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise UserError(f"{path} lacks the tensor {EMBEDDING}, a matrix; fetch it again")
    check_layers(path, config["num_hidden_layers"], tensors)
    config["tie_word_embeddings"] = family.tensors.output not in tensors
    if ROPE_FACTORS in tensors:
        scaling = read_factors(tensors[ROPE_FACTORS].read(), config.get("rope_theta", family.theirs.rope))
        if scaling is None:
            raise UserError(
                f"{path} has rotary factors in {ROPE_FACTORS} that are not those of Llama 3; use another model"
            )
        config["rope_scaling"] = scaling
    return Source(
        path,
        family.tensors,
        read_settings(family.theirs, config),
        tensors[EMBEDDING].shape[0],
        tensors,
        path if "tokenizer.ggml.model" in header.facts else None,
        tuple(not_read(name, family, header.facts)),
        {ours: header.facts.get(theirs) for ours, theirs in IDS.items()},
    )
