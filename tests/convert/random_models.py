"""Small random models of every architecture: as folders of transformers, and as models of ours."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from llmjax.build.model import make_model
from llmjax.config.imported import imported_config
from llmjax.config.resolve import resolve_config
from llmjax.convert.architectures.contract import Architecture
from llmjax.convert.architectures.forms import PLUS_ONE, SAME
from llmjax.convert.architectures.table import ARCHITECTURES
from llmjax.convert.config_keys import architecture_of
from llmjax.convert.hf_folder import open_model
from llmjax.convert.params import write_params
from llmjax.convert.source import Source
from llmjax.models.contract import Model
from llmjax.ops.logits import head_logits
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout
from llmjax.types import Batch, Params

V, T = 30, 24
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "n_positions": 32,
    "decoder_start_token_id": 0,
}  # fmt: skip
# What makes a small model of each architecture, as keys of its config.json. Every feature that can differ between two
# models of an architecture is on in one of them.
VARIANTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": SIZES | {"rope_theta": 500.0},
    "LlamaForCausalLM llama3": SIZES
    | {
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "LlamaForCausalLM linear": SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "MistralForCausalLM": SIZES | {"sliding_window": 5},
    "Qwen2ForCausalLM": {key: value for key, value in SIZES.items() if key != "head_dim"} | {"rope_theta": 1e6},
    "Qwen3ForCausalLM": SIZES | {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": SIZES
    | {
        "tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 12,
        "final_logit_softcapping": 6.0, "attn_logit_softcapping": 3.0,
    },
    "Gemma3ForCausalLM": SIZES
    | {
        "tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 12, "rope_theta": 1e5,
        "rope_local_base_freq": 100.0, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "Olmo2ForCausalLM": SIZES,
    "MixtralForCausalLM": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "OlmoeForCausalLM": {key: value for key, value in SIZES.items() if key != "head_dim"}
    | {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "Qwen3MoeForCausalLM": SIZES
    | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 20},
    "BertForMaskedLM": {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    "BertModel": {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 32, "type_vocab_size": 3, "layer_norm_eps": 1e-3,
    },
    "T5ForConditionalGeneration": T5,
    "T5ForConditionalGeneration untied": T5 | {"tie_word_embeddings": False},
    "T5ForConditionalGeneration gated tied": T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2},
    "T5ForConditionalGeneration gated": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "MarianMTModel": {
        "vocab_size": V, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2,
        "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "scale_embedding": True,
        "activation_function": "swish", "max_position_embeddings": 32, "init_std": 0.2, "decoder_start_token_id": 0,
    },
    "GPT2LMHeadModel": {
        "vocab_size": V, "n_embd": 16, "n_inner": 24, "n_layer": 3, "n_head": 4, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
# Sizes that make any of them so small that its files have a few KB.
TINY = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "n_embd": 8, "n_inner": 12, "n_layer": 2, "n_head": 2,
    "num_experts": 3, "num_local_experts": 3, "moe_intermediate_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 12,
    "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip


def config_json(variant: str) -> dict[str, Any]:
    """The config.json of a variant, as transformers writes it."""
    name = variant.split()[0]
    return {
        "architectures": [name],
        "model_type": next(each.model_type for each in ARCHITECTURES.values() if each.name == name),
        "rms_norm_eps": 1e-5,
        # PyTorch gives the embedding of padding no gradient, which ours has as any other.
        "pad_token_id": None,
        **VARIANTS[variant],
    }


def architecture(variant: str) -> Architecture:
    """The name table of a variant."""
    return architecture_of(config_json(variant))


assert {architecture(variant).title for variant in VARIANTS} == ARCHITECTURES.keys(), (
    "every architecture has a variant here"
)


def with_random_numbers(model: Any, config: dict[str, Any], torch: Any) -> None:
    """Gives a new model of transformers random numbers where it begins with others that would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms and biases begin with 1 and 0.
                parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer += torch.randn_like(buffer)
        if config["model_type"] == "t5" and config.get("tie_word_embeddings") is False:
            # transformers makes T5 with tied embeddings only, and reads it with others.
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model of ours that was read from a folder, and what it was read from."""

    source: Source
    model: Model
    params: Params

    def score(self, params: Params, batch: Batch) -> jax.Array:
        """logits_BTV with these parameters."""
        return head_logits(self.model.apply(params, batch).hidden_BTD, self.model.head(params))

    def logits(self, batch: Batch) -> np.ndarray:
        """logits_BTV with its own parameters."""
        return np.asarray(jax.jit(self.score)(self.params, batch))


def model_of(source: Source) -> Model:
    """The model of ours for a source, on one device."""
    config, derived = resolve_config(imported_config(source.settings), 1)
    return make_model(config, derived, source.vocab_size, Layout(make_mesh(config.mesh, jax.devices()[:1])))


def read(folder: pathlib.Path) -> Imported:
    """The model in a folder of transformers."""
    source = open_model(folder)
    model = model_of(source)
    return Imported(source, model, source.read(jax.eval_shape(model.init, jax.random.key(0))))


def write(folder: pathlib.Path, variant: str, seed: int = 0, **changes: Any) -> pathlib.Path:
    """A folder of transformers with random weights, written without transformers. `changes` are made to config.json."""
    from safetensors.numpy import save_file

    config = config_json(variant) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # The shapes follow from the name table: a file without tensors says them.
    save_file({}, folder / "model.safetensors")
    source = open_model(folder)
    places = source.places(jax.eval_shape(model_of(source).init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    tensors = {
        name: (0.2 * rng.normal(size=place.shape) + (len(place.shape) == 1)).astype(np.float32)
        for name, place in places.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_text(tokens_BT: np.ndarray) -> Batch:
    """A batch whose rows are a text each."""
    return batch_of(tokens_BT, np.ones(tokens_BT.shape, np.int32))


def batch_of(tokens_BT: np.ndarray, segments_BT: np.ndarray) -> Batch:
    """A batch with these segments, whose positions restart in each. Models that read a source read the same texts."""
    B, length = tokens_BT.shape
    begins = np.diff(segments_BT, axis=1, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(begins, np.arange(length), 0), axis=1)
    positions_BT = (np.arange(length)[None] - starts).astype(np.int32)
    tokens_BT = tokens_BT.astype(np.int32)
    weights_BT = (segments_BT > 0).astype(np.float32)
    return Batch(
        tokens_BT, tokens_BT, weights_BT, segments_BT, positions_BT, np.arange(B, dtype=np.int32),
        source_tokens=tokens_BT, source_segments=segments_BT, source_positions=positions_BT,
    )  # fmt: skip


def tensors_of(source: Source, params: Params) -> dict[str, np.ndarray]:
    """Parameters of ours as tensors with the names that they have in the file of a source."""
    places = source.places(params)
    names = source.match(places).names
    return {names[name]: array for name, array in write_params(places, params, "float32")}


def gradients_of(source: Source, gradients: Params) -> dict[str, np.ndarray]:
    """Gradients of ours as those of the tensors in the file of a source."""
    # A scale that is stored less 1 has the same gradient.
    places = {
        name: dataclasses.replace(place, form=SAME) if place.form is PLUS_ONE else place
        for name, place in source.places(gradients).items()
    }
    return dict(write_params(places, gradients, "float32"))
