"""BERT (Devlin et al. 2018): with a head that predicts masked tokens, or without one, as in models of sentences."""

import dataclasses

from llmjax.convert.architectures.contract import Architecture, Key
from llmjax.convert.architectures.forms import HEADS, SAME, TRANSPOSED, TRANSPOSED_HEADS, stored

BERT = Architecture(
    name="BertForMaskedLM",
    model_type="bert",
    keys={
        "num_hidden_layers": Key("model.num_layers", 12),
        "hidden_size": Key("model.model_dim", 768),
        "num_attention_heads": Key("transformer.num_heads", 12),
        "intermediate_size": Key("transformer.mlp_dim", 3072),
        "max_position_embeddings": Key("data.seq_len", 512),
        "type_vocab_size": Key("bert.token_types", 2),
        "layer_norm_eps": Key("transformer.norm_eps", 1e-12),
        "initializer_range": Key("model.init_std", 0.02),
    },
    only={
        "hidden_act": ("gelu", "gelu_python"),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    always={
        "model.family": "bert",
        "model.tie_embeddings": True,
        "transformer.position": "learned",
        "transformer.norm": "layernorm",
        "transformer.norm_at": "sum",
        "transformer.activation": "gelu_erf",
        "transformer.use_bias": True,
        # As many heads for keys as for queries, as wide as the model together.
        "transformer.num_kv_heads": 0,
        "transformer.head_dim": 0,
        "bert.embedding_norm": True,
        "bert.transform": True,
        "bert.output_bias": True,
    },
    outer={
        "bert.embeddings.word_embeddings.weight": stored(SAME, "embedding/embedding_VD"),
        "bert.embeddings.position_embeddings.weight": stored(SAME, "embedding/positions_TD"),
        "bert.embeddings.token_type_embeddings.weight": stored(SAME, "embedding/token_types_CD"),
        "bert.embeddings.LayerNorm.weight": stored(SAME, "embedding_norm/scale"),
        "bert.embeddings.LayerNorm.bias": stored(SAME, "embedding_norm/bias"),
        "cls.predictions.transform.dense.weight": stored(TRANSPOSED, "transform/w_DD"),
        "cls.predictions.transform.dense.bias": stored(SAME, "transform/bias"),
        "cls.predictions.transform.LayerNorm.weight": stored(SAME, "transform/norm/scale"),
        "cls.predictions.transform.LayerNorm.bias": stored(SAME, "transform/norm/bias"),
        "cls.predictions.bias": stored(SAME, "output/bias_V"),
        "cls.predictions.decoder.weight": stored(SAME, "embedding/unembedding_VD"),
    },
    layer={
        "bert.encoder.layer.{}.attention.self.query.weight": stored(TRANSPOSED_HEADS, "attention/wq_DNH"),
        "bert.encoder.layer.{}.attention.self.query.bias": stored(HEADS, "attention/q_bias"),
        "bert.encoder.layer.{}.attention.self.key.weight": stored(TRANSPOSED_HEADS, "attention/wk_DKH"),
        "bert.encoder.layer.{}.attention.self.key.bias": stored(HEADS, "attention/k_bias"),
        "bert.encoder.layer.{}.attention.self.value.weight": stored(TRANSPOSED_HEADS, "attention/wv_DKH"),
        "bert.encoder.layer.{}.attention.self.value.bias": stored(HEADS, "attention/v_bias"),
        "bert.encoder.layer.{}.attention.output.dense.weight": stored(HEADS, "attention/wo_DNH"),
        "bert.encoder.layer.{}.attention.output.dense.bias": stored(SAME, "attention/out_bias"),
        "bert.encoder.layer.{}.attention.output.LayerNorm.weight": stored(SAME, "attention_sum_norm/scale"),
        "bert.encoder.layer.{}.attention.output.LayerNorm.bias": stored(SAME, "attention_sum_norm/bias"),
        "bert.encoder.layer.{}.intermediate.dense.weight": stored(TRANSPOSED, "mlp/w_up_DF"),
        "bert.encoder.layer.{}.intermediate.dense.bias": stored(SAME, "mlp/up_bias"),
        "bert.encoder.layer.{}.output.dense.weight": stored(SAME, "mlp/w_down_DF"),
        "bert.encoder.layer.{}.output.dense.bias": stored(SAME, "mlp/down_bias"),
        "bert.encoder.layer.{}.output.LayerNorm.weight": stored(SAME, "mlp_sum_norm/scale"),
        "bert.encoder.layer.{}.output.LayerNorm.bias": stored(SAME, "mlp_sum_norm/bias"),
    },
    buffers=(r"(bert\.)?embeddings\.(position|token_type)_ids",),
    left_out={
        r"(bert\.)?pooler\.dense\.(weight|bias)": "the pooler",
        r"(bert\.)?cls\.seq_relationship\.(weight|bias)": "the head for the next sentence",
    },
    repeats={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    # As the weights of the first BERT were converted from TensorFlow.
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    prefix="bert.",
    rope=0.0,
    also=("BertForPreTraining",),
    opened_as="AutoModelForMaskedLM",
)

BERT_MODEL = dataclasses.replace(
    BERT,
    name="BertModel",
    always={**BERT.always, "bert.transform": False, "bert.output_bias": False},
    outer={name.removeprefix("bert."): line for name, line in BERT.outer.items() if name.startswith("bert.")},
    layer={name.removeprefix("bert."): line for name, line in BERT.layer.items()},
    repeats={},
    renamed=(*BERT.renamed, (r"^bert\.", "")),
    prefix="",
    also=(),
    opened_as="AutoModel",
    untrained="no head that predicts masked tokens, so that its logits, made with the embedding, mean little before "
    "they are trained",
)
