"""A model of llama2.c: a .bin file of version 0, with the tokenizer file that belongs to it beside it."""

from __future__ import annotations

import pathlib

from llmjax.convert.architectures.llama2c import LLAMA2C
from llmjax.convert.files.llama2c_file import open_file
from llmjax.convert.rope_keys import rope_settings
from llmjax.convert.source import Source

# What run.c of llama2.c has in its code and not in its files.
NORM_EPS, ROPE_THETA = 1e-5, 10000.0
# The name that the files of tokenizers have there: tok512.bin, tokenizer.bin.
TOKENIZERS = "tok*.bin"


def open_model(path: pathlib.Path) -> Source:
    """The model in the file `path`; its tensors are not read. Raises UserError, in one sentence, if it is none."""
    sizes, tensors = open_file(path)
    settings = {
        **LLAMA2C.fixed,
        "model.num_layers": sizes.num_layers,
        "model.model_dim": sizes.model_dim,
        "model.tie_embeddings": sizes.tied,
        "transformer.num_heads": sizes.num_heads,
        "transformer.num_kv_heads": sizes.num_kv_heads,
        "transformer.mlp_dim": sizes.mlp_dim,
        "transformer.norm_eps": NORM_EPS,
        **rope_settings({}, ROPE_THETA),
        "data.seq_len": sizes.seq_len,
    }
    # A tokenizer is taken only if there is no doubt which one is meant.
    beside = sorted(path.parent.glob(TOKENIZERS))
    tokenizer = beside[0] if len(beside) == 1 else None
    return Source(path, LLAMA2C, settings, sizes.vocab_size, tensors, tokenizer)
