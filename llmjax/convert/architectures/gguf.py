"""The families of models that GGUF files (llama.cpp) hold, as the tables of `transformers` with other names.

llama.cpp stores the same matrices, with two exceptions: in Llama the dimensions of a head that rotate together lie side
by side, and 1 is added to the scales of the norms of Gemma already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llmjax.convert.architectures.contract import Architecture
from llmjax.convert.architectures.forms import INTERLEAVED_HEADS, PLUS_ONE, SAME, Form, Stored
from llmjax.convert.architectures.gemma import GEMMA2, GEMMA3
from llmjax.convert.architectures.llama import LLAMA, QWEN2, QWEN3

# The name of a part in `transformers` -> in GGUF. The last name, weight or bias, is the same in both.
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICH = {
    **LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Facts, without the name of the family before them, that say the same as a key of config.json.
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
WINDOW_KEYS = {
    **KEYS,
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Factors of the rotary wavelengths (Llama 3), which become keys of ours.
ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of GGUF files.

    theirs      the table of `transformers` for the same models
    tensors     the same with the names and forms of the tensors in GGUF
    keys        facts that are keys of config.json
    has_width   whether its heads may have another width than model_dim / num_heads
    wide_score  the number of layers of the one model whose scores are divided by the root of model_dim / num_heads, and
                not of the width of a head: the file does not say it. 0 if there is none
    """

    theirs: Architecture
    tensors: Architecture
    keys: Mapping[str, str]
    has_width: bool = True
    wide_score: int = 0


def _renamed(theirs: Architecture, layer: Mapping[str, str], forms: Mapping[str, Form] = {}) -> Architecture:
    """`theirs` with the names of GGUF, and with other `forms` of some parts of a layer, by their names there."""

    def line(part: str, stored: Stored) -> Stored:
        same = SAME if stored.form is PLUS_ONE else stored.form
        return dataclasses.replace(stored, form=forms.get(part, same))

    outer = {}
    for name, stored in theirs.outer.items():
        part, _, last = name.rpartition(".")
        outer[f"{OUTER[part]}.{last}"] = line(part, stored)
    inner = {}
    for name, stored in theirs.layer.items():
        part, _, last = name.removeprefix("model.layers.{}.").rpartition(".")
        inner[f"blk.{{}}.{layer[part]}.{last}"] = line(layer[part], stored)
    return dataclasses.replace(
        theirs, outer=outer, layer=inner, buffers=(r"rope_freqs\.weight",), prefix="", described_by="header"
    )


# By the fact general.architecture. In this order they are tried for a model that is to be written.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        LLAMA, _renamed(LLAMA, LAYER, {"attn_q": INTERLEAVED_HEADS, "attn_k": INTERLEAVED_HEADS}), KEYS
    ),
    "qwen2": Family(QWEN2, _renamed(QWEN2, LAYER), KEYS, has_width=False),
    "qwen3": Family(QWEN3, _renamed(QWEN3, LAYER), KEYS),
    "gemma2": Family(GEMMA2, _renamed(GEMMA2, SANDWICH), WINDOW_KEYS, wide_score=46),
    "gemma3": Family(
        GEMMA3,
        _renamed(GEMMA3, SANDWICH),
        {**WINDOW_KEYS, "rope.freq_base_swa": "rope_local_base_freq"},
        wide_score=62,
    ),
}
