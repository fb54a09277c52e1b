"""Llama as llama2.c names it, with heads whose dimensions turn in neighbouring pairs, as in Meta's own files."""

from llmjax.convert.architectures.contract import Architecture
from llmjax.convert.architectures.forms import (
    HEADS,
    INTERLEAVED_HEADS,
    SAME,
    TRANSPOSED,
    TRANSPOSED_HEADS,
    stored,
)

LLAMA2C = Architecture(
    name="llama2.c",
    model_type="llama2.c",
    keys={},
    only={},
    always={},
    outer={
        "tok_embeddings": stored(SAME, "embedding/embedding_VD"),
        "norm": stored(SAME, "final_norm/scale"),
        "output": stored(SAME, "embedding/unembedding_VD"),
    },
    layer={
        "layers.{}.attention_norm": stored(SAME, "attention_norm/scale"),
        "layers.{}.wq": stored(INTERLEAVED_HEADS, "attention/wq_DNH"),
        "layers.{}.wk": stored(INTERLEAVED_HEADS, "attention/wk_DKH"),
        "layers.{}.wv": stored(TRANSPOSED_HEADS, "attention/wv_DKH"),
        "layers.{}.wo": stored(HEADS, "attention/wo_DNH"),
        "layers.{}.ffn_norm": stored(SAME, "mlp_norm/scale"),
        "layers.{}.w1": stored(TRANSPOSED, "mlp/w_gate_DF"),
        "layers.{}.w2": stored(SAME, "mlp/w_down_DF"),
        "layers.{}.w3": stored(TRANSPOSED, "mlp/w_up_DF"),
    },
    buffers=("freqs_cos", "freqs_sin"),
)
