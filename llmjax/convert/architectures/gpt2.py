"""GPT-2 (Radford et al. 2019). Its matrices lie as [inputs, outputs], queries, keys and values side by side."""

from llmjax.convert.architectures.contract import Architecture, Key
from llmjax.convert.architectures.forms import HEADS, SAME, TRANSPOSED, TRANSPOSED_HEADS, stored

GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    keys={
        "n_layer": Key("model.num_layers", 12),
        "n_embd": Key("model.model_dim", 768),
        "n_head": Key("transformer.num_heads", 12),
        "n_inner": Key("transformer.mlp_dim", 0),
        "n_positions": Key("data.seq_len", 1024),
        "layer_norm_epsilon": Key("transformer.norm_eps", 1e-5),
        "initializer_range": Key("model.init_std", 0.02),
        "tie_word_embeddings": Key("model.tie_embeddings", True),
    },
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    always={
        "transformer.position": "learned",
        "transformer.norm": "layernorm",
        "transformer.activation": "gelu",
        "transformer.use_bias": True,
        # As many heads for keys as for queries, as wide as the model together.
        "transformer.num_kv_heads": 0,
        "transformer.head_dim": 0,
    },
    outer={
        "transformer.wte.weight": stored(SAME, "embedding/embedding_VD"),
        "transformer.wpe.weight": stored(SAME, "embedding/positions_TD"),
        "transformer.ln_f.weight": stored(SAME, "final_norm/scale"),
        "transformer.ln_f.bias": stored(SAME, "final_norm/bias"),
        "lm_head.weight": stored(SAME, "embedding/unembedding_VD"),
    },
    layer={
        "transformer.h.{}.ln_1.weight": stored(SAME, "attention_norm/scale"),
        "transformer.h.{}.ln_1.bias": stored(SAME, "attention_norm/bias"),
        "transformer.h.{}.attn.c_attn.weight": stored(
            HEADS, "attention/wq_DNH", "attention/wk_DKH", "attention/wv_DKH", axis=1
        ),
        "transformer.h.{}.attn.c_attn.bias": stored(
            HEADS, "attention/q_bias", "attention/k_bias", "attention/v_bias"
        ),
        "transformer.h.{}.attn.c_proj.weight": stored(TRANSPOSED_HEADS, "attention/wo_DNH"),
        "transformer.h.{}.attn.c_proj.bias": stored(SAME, "attention/out_bias"),
        "transformer.h.{}.ln_2.weight": stored(SAME, "mlp_norm/scale"),
        "transformer.h.{}.ln_2.bias": stored(SAME, "mlp_norm/bias"),
        "transformer.h.{}.mlp.c_fc.weight": stored(SAME, "mlp/w_up_DF"),
        "transformer.h.{}.mlp.c_fc.bias": stored(SAME, "mlp/up_bias"),
        "transformer.h.{}.mlp.c_proj.weight": stored(TRANSPOSED, "mlp/w_down_DF"),
        "transformer.h.{}.mlp.c_proj.bias": stored(SAME, "mlp/down_bias"),
    },
    buffers=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    prefix="transformer.",
    rope=0.0,
)
