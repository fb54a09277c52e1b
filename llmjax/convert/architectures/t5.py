"""T5 (Raffel et al. 2020): the first form with a plain feed-forward layer, and version 1.1 with a gated one.

Scores are not divided, which the initial values of the published models make up for. The first layer of each stack
holds the table of relative positions, which all layers use.
"""

import dataclasses

from llmjax.convert.architectures.contract import Architecture, Key
from llmjax.convert.architectures.forms import HEADS, SAME, TRANSPOSED, TRANSPOSED_HEADS, stored


def _attention(name, ours):
    return {
        f"{name}.q.weight": stored(TRANSPOSED_HEADS, f"{ours}/wq_DNH"),
        f"{name}.k.weight": stored(TRANSPOSED_HEADS, f"{ours}/wk_DKH"),
        f"{name}.v.weight": stored(TRANSPOSED_HEADS, f"{ours}/wv_DKH"),
        f"{name}.o.weight": stored(HEADS, f"{ours}/wo_DNH"),
    }


def _feed_forward(name, gated):
    """The two matrices of the first form, or the three of version 1.1, of which the first one is the gate."""
    up = {f"{name}.wi.weight": stored(TRANSPOSED, "mlp/w_up_DF")}
    if gated:
        up = {
            f"{name}.wi_0.weight": stored(TRANSPOSED, "mlp/w_gate_DF"),
            f"{name}.wi_1.weight": stored(TRANSPOSED, "mlp/w_up_DF"),
        }
    return {**up, f"{name}.wo.weight": stored(SAME, "mlp/w_down_DF")}


def _encoder(gated):
    return {
        **_attention("encoder.block.{}.layer.0.SelfAttention", "attention"),
        "encoder.block.{}.layer.0.layer_norm.weight": stored(SAME, "attention_norm/scale"),
        **_feed_forward("encoder.block.{}.layer.1.DenseReluDense", gated),
        "encoder.block.{}.layer.1.layer_norm.weight": stored(SAME, "mlp_norm/scale"),
    }


def _decoder(gated):
    return {
        **_attention("decoder.block.{}.layer.0.SelfAttention", "attention"),
        "decoder.block.{}.layer.0.layer_norm.weight": stored(SAME, "attention_norm/scale"),
        **_attention("decoder.block.{}.layer.1.EncDecAttention", "source_attention"),
        "decoder.block.{}.layer.1.layer_norm.weight": stored(SAME, "source_norm/scale"),
        **_feed_forward("decoder.block.{}.layer.2.DenseReluDense", gated),
        "decoder.block.{}.layer.2.layer_norm.weight": stored(SAME, "mlp_norm/scale"),
    }


TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

T5 = Architecture(
    name="T5ForConditionalGeneration",
    model_type="t5",
    keys={
        "num_layers": Key("encoder_decoder.encoder_layers", 6),
        "num_decoder_layers": Key("model.num_layers", 6, also="num_layers"),
        "d_model": Key("model.model_dim", 512),
        "d_kv": Key("transformer.head_dim", 64),
        "d_ff": Key("transformer.mlp_dim", 2048),
        "num_heads": Key("transformer.num_heads", 8),
        "n_positions": Key("data.seq_len", 512),
        "relative_attention_num_buckets": Key("transformer.relative_buckets", 32),
        "relative_attention_max_distance": Key("transformer.relative_distance", 128),
        "layer_norm_epsilon": Key("transformer.norm_eps", 1e-6),
    },
    only={
        "feed_forward_proj": ("relu",),
        "dense_act_fn": ("relu",),
        "is_gated_act": (False,),
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
    },
    always={
        "model.family": "encoder_decoder",
        "transformer.position": "relative",
        "transformer.activation": "relu",
        "transformer.num_kv_heads": 0,
        "transformer.score_dim": 1,
        "encoder_decoder.output_bias": False,
    },
    outer={
        "shared.weight": stored(SAME, "embedding/embedding_VD"),
        "lm_head.weight": stored(SAME, "embedding/unembedding_VD"),
        f"encoder.{TABLE}": stored(SAME, "encoder_relative/table_RN"),
        f"decoder.{TABLE}": stored(SAME, "relative/table_RN"),
        "encoder.final_layer_norm.weight": stored(SAME, "encoder_norm/scale"),
        "decoder.final_layer_norm.weight": stored(SAME, "final_norm/scale"),
    },
    layer=_decoder(gated=False),
    encoder=_encoder(gated=False),
    # The first files of T5 have a table for the attention to the source, which nothing reads.
    buffers=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    repeats={f"{name}.embed_tokens.weight": "shared.weight" for name in ("encoder", "decoder")},
    rope=0.0,
    scales_tied=True,
    also=("T5WithLMHeadModel",),
    opened_as="AutoModelForSeq2SeqLM",
)

T5_GATED = dataclasses.replace(
    T5,
    form="gated",
    only={
        **T5.only,
        "feed_forward_proj": ("gated-gelu",),
        "dense_act_fn": ("gelu_new",),
        "is_gated_act": (True,),
    },
    always={**T5.always, "transformer.activation": "geglu"},
    layer=_decoder(gated=True),
    encoder=_encoder(gated=True),
)
