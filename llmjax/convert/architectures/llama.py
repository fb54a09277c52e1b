"""Llama (Touvron et al. 2023) with SmolLM2, and its relatives Mistral, Qwen2 and Qwen3, which add little to it."""

import dataclasses

from llmjax.convert.architectures.contract import Architecture, Key
from llmjax.convert.architectures.forms import HEADS, SAME, TRANSPOSED, TRANSPOSED_HEADS, stored

# The keys that all of them have.
KEYS = {
    "num_hidden_layers": Key("model.num_layers", 32),
    "hidden_size": Key("model.model_dim", 4096),
    "intermediate_size": Key("transformer.mlp_dim", 11008),
    "num_attention_heads": Key("transformer.num_heads", 32),
    "num_key_value_heads": Key("transformer.num_kv_heads", 0),
    "head_dim": Key("transformer.head_dim", 0),
    "max_position_embeddings": Key("data.seq_len", 2048),
    "rms_norm_eps": Key("transformer.norm_eps", 1e-6),
    "initializer_range": Key("model.init_std", 0.02),
    "tie_word_embeddings": Key("model.tie_embeddings", False),
}

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    keys=KEYS,
    only={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    always={},
    outer={
        "model.embed_tokens.weight": stored(SAME, "embedding/embedding_VD"),
        "model.norm.weight": stored(SAME, "final_norm/scale"),
        "lm_head.weight": stored(SAME, "embedding/unembedding_VD"),
    },
    layer={
        "model.layers.{}.input_layernorm.weight": stored(SAME, "attention_norm/scale"),
        "model.layers.{}.self_attn.q_proj.weight": stored(TRANSPOSED_HEADS, "attention/wq_DNH"),
        "model.layers.{}.self_attn.k_proj.weight": stored(TRANSPOSED_HEADS, "attention/wk_DKH"),
        "model.layers.{}.self_attn.v_proj.weight": stored(TRANSPOSED_HEADS, "attention/wv_DKH"),
        "model.layers.{}.self_attn.o_proj.weight": stored(HEADS, "attention/wo_DNH"),
        "model.layers.{}.post_attention_layernorm.weight": stored(SAME, "mlp_norm/scale"),
        "model.layers.{}.mlp.gate_proj.weight": stored(TRANSPOSED, "mlp/w_gate_DF"),
        "model.layers.{}.mlp.up_proj.weight": stored(TRANSPOSED, "mlp/w_up_DF"),
        "model.layers.{}.mlp.down_proj.weight": stored(SAME, "mlp/w_down_DF"),
    },
    buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    prefix="model.",
)

MISTRAL = dataclasses.replace(
    LLAMA,
    name="MistralForCausalLM",
    model_type="mistral",
    keys={
        **KEYS,
        "intermediate_size": Key("transformer.mlp_dim", 14336),
        "num_key_value_heads": Key("transformer.num_kv_heads", 8),
        "max_position_embeddings": Key("data.seq_len", 4096 * 32),
        "sliding_window": Key("transformer.window", 4096, none=0),
    },
    only={"hidden_act": ("silu",)},
)

QWEN2 = dataclasses.replace(
    LLAMA,
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    keys={
        **KEYS,
        "intermediate_size": Key("transformer.mlp_dim", 22016),
        "num_key_value_heads": Key("transformer.num_kv_heads", 32),
        "max_position_embeddings": Key("data.seq_len", 32768),
    },
    only={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    always={"transformer.qkv_bias": True},
    layer={
        **LLAMA.layer,
        "model.layers.{}.self_attn.q_proj.bias": stored(HEADS, "attention/q_bias"),
        "model.layers.{}.self_attn.k_proj.bias": stored(HEADS, "attention/k_bias"),
        "model.layers.{}.self_attn.v_proj.bias": stored(HEADS, "attention/v_bias"),
    },
)

QWEN3 = dataclasses.replace(
    LLAMA,
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    keys={**QWEN2.keys, "head_dim": Key("transformer.head_dim", 128)},
    only={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    always={"transformer.qk_norm": True},
    layer={
        **LLAMA.layer,
        "model.layers.{}.self_attn.q_norm.weight": stored(SAME, "attention/q_norm/scale"),
        "model.layers.{}.self_attn.k_norm.weight": stored(SAME, "attention/k_norm/scale"),
    },
)
