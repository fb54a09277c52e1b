"""Gemma 2 (Riviere et al. 2024) and Gemma 3 (Kamath et al. 2025): norms on both sides of each layer, whose scale is
1 + the stored one, scaled embeddings, and layers with a window between layers without."""

import dataclasses

from llmjax.convert.architectures.contract import Architecture, Key
from llmjax.convert.architectures.forms import PLUS_ONE, SAME, stored
from llmjax.convert.architectures.llama import KEYS, LLAMA

GEMMA2 = Architecture(
    name="Gemma2ForCausalLM",
    model_type="gemma2",
    keys={
        **KEYS,
        "num_hidden_layers": Key("model.num_layers", 26),
        "hidden_size": Key("model.model_dim", 2304),
        "intermediate_size": Key("transformer.mlp_dim", 9216),
        "num_attention_heads": Key("transformer.num_heads", 8),
        "num_key_value_heads": Key("transformer.num_kv_heads", 4),
        "head_dim": Key("transformer.head_dim", 256),
        "max_position_embeddings": Key("data.seq_len", 8192),
        "tie_word_embeddings": Key("model.tie_embeddings", True),
        "query_pre_attn_scalar": Key("transformer.score_dim", 256),
        "sliding_window": Key("transformer.window", 4096, none=0),
        "final_logit_softcapping": Key("model.logit_softcap", 30.0, none=0.0),
        "attn_logit_softcapping": Key("transformer.attention_softcap", 50.0, none=0.0),
    },
    only={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (False,),
    },
    always={
        "transformer.activation": "geglu",
        "transformer.norm_at": "both",
        "transformer.scale_embedding": True,
    },
    outer={
        "model.embed_tokens.weight": stored(SAME, "embedding/embedding_VD"),
        "model.norm.weight": stored(PLUS_ONE, "final_norm/scale"),
        "lm_head.weight": stored(SAME, "embedding/unembedding_VD"),
    },
    layer={
        **LLAMA.layer,
        "model.layers.{}.input_layernorm.weight": stored(PLUS_ONE, "attention_norm/scale"),
        "model.layers.{}.post_attention_layernorm.weight": stored(PLUS_ONE, "attention_out_norm/scale"),
        "model.layers.{}.pre_feedforward_layernorm.weight": stored(PLUS_ONE, "mlp_norm/scale"),
        "model.layers.{}.post_feedforward_layernorm.weight": stored(PLUS_ONE, "mlp_out_norm/scale"),
    },
    buffers=LLAMA.buffers,
    prefix="model.",
    alternates=2,
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    keys={
        **GEMMA2.keys,
        "max_position_embeddings": Key("data.seq_len", 131072),
        "final_logit_softcapping": Key("model.logit_softcap", 0.0, none=0.0),
        "attn_logit_softcapping": Key("transformer.attention_softcap", 0.0, none=0.0),
    },
    always={**GEMMA2.always, "transformer.qk_norm": True},
    layer={
        **GEMMA2.layer,
        "model.layers.{}.self_attn.q_norm.weight": stored(PLUS_ONE, "attention/q_norm/scale"),
        "model.layers.{}.self_attn.k_norm.weight": stored(PLUS_ONE, "attention/k_norm/scale"),
    },
    alternates=6,
    rope=1e6,
    local_rope=10000.0,
)
