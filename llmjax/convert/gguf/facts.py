"""The facts of a GGUF file as the config.json of the same model, and back, by the tables of `architectures/gguf.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmjax.convert.architectures.gguf import FAMILIES, Family
from llmjax.convert.files.json_file import MOST
from llmjax.errors import UserError
from llmjax.ranges import shown

FAMILY = "general.architecture"
# Facts without which there is no model.
NEEDED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# Facts that are read beside those of the tables, without the name of the family before them.
OTHERS = (
    "vocab_size",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "expert_count",
)
# The ids of special tokens, by their names in config.json.
IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def family_of(facts: Mapping[str, Any], where: str) -> tuple[str, Family]:
    """The name and the family of a file. UserError, which lists all there are, if it is none of them."""
    name = facts.get(FAMILY)
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{where} has {FAMILY}={shown(name)}, which is not known; use a model of {', '.join(FAMILIES)}"
        )
    if facts.get("split.count", 1) != 1:
        raise UserError(
            f"{where} is one of several parts; join them with llama-gguf-split --merge of llama.cpp"
        )
    return name, FAMILIES[name]


def read_config(name: str, family: Family, facts: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json that these facts mean, but for what the tensors say: vocab_size and tie_word_embeddings.

    Raises UserError for a fact that is missing, of another type than it must be, or of a value that we cannot do.
    """
    reader = _Facts(name, facts, where)
    for key in NEEDED:
        if f"{name}.{key}" not in facts:
            raise UserError(f"{where} lacks {name}.{key}; it is damaged, so fetch it again")
    config: dict[str, Any] = {"architectures": [family.theirs.name], "model_type": family.theirs.model_type}
    for key, theirs in family.keys.items():
        example = 1.0 if ("epsilon" in key or "freq" in key or "softcapping" in key) else 1
        if (value := reader.number(key, example)) is not None:
            config[theirs] = value
    if reader.number("expert_count", 1):
        raise UserError(
            f"{where} has {name}.expert_count, and mixtures of experts are not read; use another model"
        )
    width = _width_of_heads(reader, config, family)
    if family.has_width:
        config["head_dim"] = width
    if family.wide_score:
        wide = config["num_hidden_layers"] == family.wide_score
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"] if wide else width
        )
    pattern = reader.facts.get(f"{name}.attention.sliding_window_pattern")
    if pattern is not None and family.theirs.alternates:
        config |= _layers_with_window(pattern, reader)
    if scaling := _rope_scaling(reader):
        config["rope_scaling"] = scaling
    return config


def not_read(name: str, family: Family, facts: Mapping[str, Any]) -> list[str]:
    """The facts about the model that are not read, for the certificate."""
    read = {f"{name}.{key}" for key in (*family.keys, *OTHERS)}
    return sorted(key for key in facts if key.startswith(f"{name}.") and key not in read)


class _Facts:
    """The facts of one family, of the types that they must have."""

    def __init__(self, name: str, facts: Mapping[str, Any], where: str):
        self.name, self.facts, self.where = name, facts, where

    def number(self, key: str, example: float) -> Any:
        """A number of the type of `example`, or None if the file does not say it."""
        value = self.facts.get(f"{self.name}.{key}")
        if value is None:
            return None
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            # A list of one value for each layer.
            value = value[0].item()
        if (
            type(example) is float
            and type(value) in (int, float)
            and math.isfinite(value)
            and abs(value) <= MOST
        ):
            # 1e-5 in float32 is 9.9999997e-06, and its shortest name is meant.
            return float(str(np.float32(value)))
        if type(value) is not type(example) or not 0 <= value <= MOST:
            raise self.error(key)
        return value

    def error(self, key: str) -> UserError:
        """The error for a fact that no model of ours has."""
        value = self.facts.get(f"{self.name}.{key}")
        value = value.tolist() if isinstance(value, np.ndarray) else value
        return UserError(
            f"{self.where} has {self.name}.{key}={shown(value)}, which llmjax cannot do; use another model"
        )


def _width_of_heads(reader: _Facts, config: Mapping[str, Any], family: Family) -> int:
    """H. Raises UserError if keys, values and rotary positions have different widths."""
    if not config["num_attention_heads"]:
        raise reader.error("attention.head_count")
    plain = config["hidden_size"] // config["num_attention_heads"]
    rotated = reader.number("rope.dimension_count", 1)
    width = reader.number("attention.key_length", 1) or rotated or plain
    if rotated not in (None, width):
        raise reader.error("rope.dimension_count")
    if reader.number("attention.value_length", 1) not in (None, width):
        raise reader.error("attention.value_length")
    if not family.has_width and width != plain:
        raise reader.error("attention.key_length")
    return width


def _layers_with_window(pattern: Any, reader: _Facts) -> dict[str, Any]:
    """A period, or a list that says of each layer whether it has a window, as keys of config.json."""
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool:
        return {"layer_types": ["sliding_attention" if has else "full_attention" for has in pattern.tolist()]}
    if isinstance(pattern, np.ndarray):
        raise reader.error("attention.sliding_window_pattern")
    return {"sliding_window_pattern": reader.number("attention.sliding_window_pattern", 1)}


def _rope_scaling(reader: _Facts) -> dict[str, Any]:
    kind = reader.facts.get(f"{reader.name}.rope.scaling.type")
    if kind is None and (factor := reader.number("rope.scale_linear", 1.0)) not in (None, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind in (None, "none"):
        return {}
    if kind not in ("linear", "yarn"):
        raise reader.error("rope.scaling.type")
    scaling = {"rope_type": kind, "factor": reader.number("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = reader.number("rope.scaling.original_context_length", 1)
    if None in scaling.values():
        raise reader.error("rope.scaling.type")
    return scaling


def write_facts(name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The facts of a model with this config.json, without those about its tokenizer.

    Raises UserError for what such a file cannot say.
    """
    family, facts = FAMILIES[name], dict[str, Any]({FAMILY: name})
    config = {
        **config,
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    for key, theirs in family.keys.items():
        if config.get(theirs) is not None:
            facts[f"{name}.{key}"] = config[theirs]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    facts[f"{name}.vocab_size"] = config["vocab_size"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        facts[f"{name}.{key}"] = width
    if family.theirs.alternates:
        facts[f"{name}.attention.sliding_window_pattern"] = config["sliding_window_pattern"]
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        facts[f"{name}.rope.scaling.type"] = scaling["rope_type"]
        facts[f"{name}.rope.scaling.factor"] = scaling["factor"]
    if scaling.get("rope_type") == "yarn":
        facts[f"{name}.rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    _check_readers(name, config, facts, where)
    return facts


def _check_readers(name: str, config: Mapping[str, Any], facts: Mapping[str, Any], where: str) -> None:
    """UserError where what the file says would be read as another model, because it has no fact for a value."""
    again = read_config(name, FAMILIES[name], facts, where)
    theirs = "query_pre_attn_scalar"
    if theirs in config and config[theirs] != again[theirs]:
        raise UserError(
            f"transformer.score_dim={config[theirs]} cannot be said in a GGUF file of {name}, whose readers take "
            f"{again[theirs]}; write it with --to hf"
        )
    period = FAMILIES[name].theirs.alternates
    if period and config["sliding_window_pattern"] != period:
        raise UserError(
            f"transformer.global_every={config['sliding_window_pattern']} cannot be said in a GGUF file of {name}, "
            f"whose readers take {period}; write it with --to hf"
        )
