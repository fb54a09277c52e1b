"""OLMo 2 (Walsh et al. 2024): norms after attention and feed-forward layer, and QK-norm over all heads together."""

import dataclasses

from llmjax.convert.architectures.contract import Key
from llmjax.convert.architectures.forms import SAME, stored
from llmjax.convert.architectures.llama import KEYS, LLAMA

OLMO2 = dataclasses.replace(
    LLAMA,
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    keys={**KEYS, "rms_norm_eps": Key("transformer.norm_eps", 1e-5)},
    only={"hidden_act": ("silu",), "attention_bias": (False,)},
    always={
        "transformer.qk_norm": True,
        "transformer.qk_norm_over": "all",
        "transformer.norm_at": "output",
    },
    layer={
        **{name: line for name, line in LLAMA.layer.items() if "norm" not in name},
        "model.layers.{}.self_attn.q_norm.weight": stored(SAME, "attention/q_norm/scale"),
        "model.layers.{}.self_attn.k_norm.weight": stored(SAME, "attention/k_norm/scale"),
        "model.layers.{}.post_attention_layernorm.weight": stored(SAME, "attention_out_norm/scale"),
        "model.layers.{}.post_feedforward_layernorm.weight": stored(SAME, "mlp_out_norm/scale"),
    },
)
