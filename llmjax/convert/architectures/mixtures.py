"""Mixtures of experts: Mixtral (Jiang et al. 2024), OLMoE (Muennighoff et al. 2024), Qwen3-MoE (Yang et al. 2025)."""

import dataclasses

from llmjax.convert.architectures.contract import Key
from llmjax.convert.architectures.forms import SAME, TRANSPOSED, stored
from llmjax.convert.architectures.llama import KEYS, LLAMA, QWEN3

# The tensors of a layer without those of its feed-forward layer.
ATTENTION = {name: line for name, line in LLAMA.layer.items() if ".mlp." not in name}
# The tensors that OLMoE and Qwen3-MoE have in place of a feed-forward layer.
EXPERTS = {
    "model.layers.{}.mlp.gate.weight": stored(TRANSPOSED, "experts/w_router_DE"),
    "model.layers.{}.mlp.experts.{}.gate_proj.weight": stored(TRANSPOSED, "experts/w_gate_EDF"),
    "model.layers.{}.mlp.experts.{}.up_proj.weight": stored(TRANSPOSED, "experts/w_up_EDF"),
    "model.layers.{}.mlp.experts.{}.down_proj.weight": stored(SAME, "experts/w_down_EDF"),
}

MIXTRAL = dataclasses.replace(
    LLAMA,
    name="MixtralForCausalLM",
    model_type="mixtral",
    keys={
        **KEYS,
        "intermediate_size": Key("experts.expert_dim", 14336),
        "num_key_value_heads": Key("transformer.num_kv_heads", 8),
        "max_position_embeddings": Key("data.seq_len", 4096 * 32),
        "rms_norm_eps": Key("transformer.norm_eps", 1e-5),
        "sliding_window": Key("transformer.window", 0, none=0),
        "num_local_experts": Key("experts.num_experts", 8),
        "num_experts_per_tok": Key("experts.experts_per_token", 2),
    },
    only={"hidden_act": ("silu",)},
    always={"experts.shared_experts": 0, "experts.normalize_gates": True},
    layer={
        **ATTENTION,
        "model.layers.{}.block_sparse_moe.gate.weight": stored(TRANSPOSED, "experts/w_router_DE"),
        "model.layers.{}.block_sparse_moe.experts.{}.w1.weight": stored(TRANSPOSED, "experts/w_gate_EDF"),
        "model.layers.{}.block_sparse_moe.experts.{}.w3.weight": stored(TRANSPOSED, "experts/w_up_EDF"),
        "model.layers.{}.block_sparse_moe.experts.{}.w2.weight": stored(SAME, "experts/w_down_EDF"),
    },
    rope=1e6,
)

OLMOE = dataclasses.replace(
    LLAMA,
    name="OlmoeForCausalLM",
    model_type="olmoe",
    keys={
        **KEYS,
        "intermediate_size": Key("experts.expert_dim", 2048),
        "rms_norm_eps": Key("transformer.norm_eps", 1e-5),
        "max_position_embeddings": Key("data.seq_len", 4096),
        "num_experts": Key("experts.num_experts", 64),
        "num_experts_per_tok": Key("experts.experts_per_token", 8),
        "norm_topk_prob": Key("experts.normalize_gates", False),
    },
    only={"hidden_act": ("silu",), "attention_bias": (False,), "clip_qkv": (None,)},
    always={
        "experts.shared_experts": 0,
        "transformer.qk_norm": True,
        "transformer.qk_norm_over": "all",
    },
    layer={
        **ATTENTION,
        "model.layers.{}.self_attn.q_norm.weight": stored(SAME, "attention/q_norm/scale"),
        "model.layers.{}.self_attn.k_norm.weight": stored(SAME, "attention/k_norm/scale"),
        **EXPERTS,
    },
)

# All layers have experts: `mlp_only_layers` and `decoder_sparse_step` would have some of them without.
QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    keys={
        **{name: key for name, key in QWEN3.keys.items() if name != "intermediate_size"},
        "num_key_value_heads": Key("transformer.num_kv_heads", 4),
        "moe_intermediate_size": Key("experts.expert_dim", 768),
        "num_experts": Key("experts.num_experts", 128, also="num_local_experts"),
        "num_experts_per_tok": Key("experts.experts_per_token", 8),
        "norm_topk_prob": Key("experts.normalize_gates", False),
    },
    only={**QWEN3.only, "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
    always={"experts.shared_experts": 0, "transformer.qk_norm": True},
    layer={
        **{name: line for name, line in QWEN3.layer.items() if ".mlp." not in name},
        **EXPERTS,
    },
)
