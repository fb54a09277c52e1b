"""Writes a folder of transformers as a GGUF file in the way of convert_hf_to_gguf.py of llama.cpp, apart from our code.

The names of tensors come from the table of the package gguf, and those of facts from its functions.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
}


def permuted(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """The function `permute` of llama.cpp: neighbouring dimensions of a head rotate together."""
    shape = (num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: pathlib.Path, folder: pathlib.Path, kind: str = "F32", **facts: Any) -> pathlib.Path:
    """Writes the model in `folder`, its matrices as numbers of a `kind`. `facts` are added, a double _ for a dot."""
    config = json.loads((folder / "config.json").read_text())
    name = config["architectures"][0]
    architecture, num_layers = ARCHITECTURES[name], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    add_facts(writer, config)
    for fact, value in facts.items():
        writer.add_key_value(
            fact.replace("__", "."), value, gguf.GGUFValueType.get_type(value) if value != [] else None
        )
    names = gguf.get_tensor_name_map(architecture, num_layers)
    for theirs, tensor in load_file(folder / "model.safetensors").items():
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name == "LlamaForCausalLM" and ("q_proj" in theirs or "k_proj" in theirs):
            heads = "num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"
            tensor = permuted(tensor, config[heads])
        if name.startswith("Gemma") and theirs.endswith("norm.weight"):
            tensor = tensor + 1
        add_tensor(writer, ours, tensor, kind)
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        add_tensor(writer, "rope_freqs.weight", llama3_factors(config), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str) -> None:
    """Adds a tensor; only matrices are quantised."""
    kind = kind if tensor.ndim > 1 else "F32"
    code = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), code), raw_dtype=code)


def add_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The facts about the sizes of a model."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        if config["architectures"][0] == "LlamaForCausalLM":
            writer.add_rope_dimension_count(config["head_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if (scaling := config.get("rope_scaling") or {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])


def llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """The loop of llama.cpp over the frequencies of Llama 3.1."""
    scaling, dim = config["rope_scaling"], config["head_dim"]
    old, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for frequency in 1.0 / config.get("rope_theta", 10000.0) ** (np.arange(0, dim, 2) / dim):
        length = 2 * np.pi / frequency
        if length < old / high:
            factors.append(1.0)
        elif length > old / low:
            factors.append(scaling["factor"])
        else:
            smooth = (old / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.asarray(factors, np.float32)
