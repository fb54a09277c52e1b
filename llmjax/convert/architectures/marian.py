"""Marian (Junczys-Dowmunt et al. 2018), as the translators of OPUS-MT have it: the Transformer of Vaswani et al. (2017)
with another activation and a bias of the logits."""

from llmjax.convert.architectures.contract import Architecture, Key
from llmjax.convert.architectures.forms import HEADS, ONE_ROW, SAME, TRANSPOSED, TRANSPOSED_HEADS, stored


def _attention(name, ours):
    return {
        f"{name}.q_proj.weight": stored(TRANSPOSED_HEADS, f"{ours}/wq_DNH"),
        f"{name}.q_proj.bias": stored(HEADS, f"{ours}/q_bias"),
        f"{name}.k_proj.weight": stored(TRANSPOSED_HEADS, f"{ours}/wk_DKH"),
        f"{name}.k_proj.bias": stored(HEADS, f"{ours}/k_bias"),
        f"{name}.v_proj.weight": stored(TRANSPOSED_HEADS, f"{ours}/wv_DKH"),
        f"{name}.v_proj.bias": stored(HEADS, f"{ours}/v_bias"),
        f"{name}.out_proj.weight": stored(HEADS, f"{ours}/wo_DNH"),
        f"{name}.out_proj.bias": stored(SAME, f"{ours}/out_bias"),
    }


def _norm(name, ours):
    return {
        f"{name}.weight": stored(SAME, f"{ours}/scale"),
        f"{name}.bias": stored(SAME, f"{ours}/bias"),
    }


def _layer(name):
    """The parts that layers of the encoder and of the decoder have."""
    return {
        **_attention(f"{name}.self_attn", "attention"),
        **_norm(f"{name}.self_attn_layer_norm", "attention_sum_norm"),
        f"{name}.fc1.weight": stored(TRANSPOSED, "mlp/w_up_DF"),
        f"{name}.fc1.bias": stored(SAME, "mlp/up_bias"),
        f"{name}.fc2.weight": stored(SAME, "mlp/w_down_DF"),
        f"{name}.fc2.bias": stored(SAME, "mlp/down_bias"),
        **_norm(f"{name}.final_layer_norm", "mlp_sum_norm"),
    }


MARIAN = Architecture(
    name="MarianMTModel",
    model_type="marian",
    keys={
        "encoder_layers": Key("encoder_decoder.encoder_layers", 12),
        "decoder_layers": Key("model.num_layers", 12),
        "d_model": Key("model.model_dim", 1024),
        "encoder_attention_heads": Key("transformer.num_heads", 16),
        "decoder_attention_heads": Key("transformer.num_heads", 16),
        "encoder_ffn_dim": Key("transformer.mlp_dim", 4096),
        "decoder_ffn_dim": Key("transformer.mlp_dim", 4096),
        "max_position_embeddings": Key("data.seq_len", 1024),
        "init_std": Key("model.init_std", 0.02),
    },
    only={
        "share_encoder_decoder_embeddings": (True,),
        "tie_word_embeddings": (True,),
        "normalize_embedding": (False,),
        "normalize_before": (False,),
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
    },
    must={"scale_embedding": (True,), "activation_function": ("swish", "silu")},
    always={
        "model.family": "encoder_decoder",
        "model.tie_embeddings": True,
        "transformer.position": "sinusoidal",
        "transformer.norm": "layernorm",
        "transformer.norm_eps": 1e-5,
        "transformer.norm_at": "sum",
        "transformer.activation": "silu",
        "transformer.use_bias": True,
        # As many heads for keys as for queries, as wide as the model together.
        "transformer.num_kv_heads": 0,
        "transformer.head_dim": 0,
        "encoder_decoder.scale_output": False,
        "encoder_decoder.output_bias": True,
    },
    outer={
        "model.shared.weight": stored(SAME, "embedding/embedding_VD"),
        "lm_head.weight": stored(SAME, "embedding/unembedding_VD"),
        "final_logits_bias": stored(ONE_ROW, "output/bias_V"),
    },
    layer={
        **_layer("model.decoder.layers.{}"),
        **_attention("model.decoder.layers.{}.encoder_attn", "source_attention"),
        **_norm("model.decoder.layers.{}.encoder_attn_layer_norm", "source_sum_norm"),
    },
    encoder=_layer("model.encoder.layers.{}"),
    # The sinusoids, which follow from the position.
    buffers=(r"model\.(encoder|decoder)\.embed_positions\.weight",),
    repeats={f"model.{name}.embed_tokens.weight": "model.shared.weight" for name in ("encoder", "decoder")},
    rope=0.0,
    opened_as="AutoModelForSeq2SeqLM",
)
