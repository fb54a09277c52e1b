"""config.json of `transformers` as keys of ours, and back, by the name tables in `architectures/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmjax.convert.architectures.contract import FREE, ROPE_KEYS, SCALES_TIED, START, Architecture
from llmjax.convert.architectures.table import ARCHITECTURES
from llmjax.convert.files.json_file import typed
from llmjax.convert.rope_keys import read_rope, write_rope
from llmjax.convert.window_keys import KEYS as WINDOW_KEYS
from llmjax.convert.window_keys import layer_types, read_period
from llmjax.errors import UserError
from llmjax.nn.config import ExpertsConfig
from llmjax.ranges import shown

# Keys that every table reads or that mean nothing to a model.
GENERAL = {
    "architectures", "model_type", "vocab_size", "rope_theta", "rope_scaling", "rope_parameters",
    "rope_local_base_freq", "bos_token_id",
    "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path",
}  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The name table for a config.json. Raises UserError, which lists all there are, if there is none for it."""
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    # Of several tables for a type, the first one counts.
    by_type = {each.model_type: each for each in reversed(ARCHITECTURES.values())}
    found = [each for name in names for each in ARCHITECTURES.values() if name in (each.name, *each.also)]
    if not names and isinstance(config.get("model_type"), str) and config["model_type"] in by_type:
        name = by_type[config["model_type"]].name
        found = [each for each in ARCHITECTURES.values() if each.name == name]
    if not found:
        what = f"architectures={shown(names)}" if names else f"model_type={shown(config.get('model_type'))}"
        raise UserError(
            f"config.json has {what}, which is not known; use a model of {', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config, and quantised weights are not read here; use the model as float32, "
            "bfloat16 or float16"
        )
    # The keys of config.json tell the tables of a class apart. If none can do them, the first one says so.
    return next(
        (each for each in found if each.name == found[0].name and not _undoable(each, config)), found[0]
    )


def _undoable(architecture: Architecture, config: Mapping[str, Any]) -> str:
    """A key of config.json whose value we cannot do in models of this table; nothing if there is none."""
    values = {name: config.get(name) for name in {**architecture.only, **architecture.must}}
    wrong = [name for name, known in architecture.only.items() if values[name] not in (None, *known)]
    wrong += [name for name, known in architecture.must.items() if values[name] not in known]
    return wrong[0] if wrong else ""


def read_settings(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys, {whole key: value}, `data.seq_len` among them, that a config.json means.

    Raises UserError for a value that we cannot do or that is of another type than ours.
    """
    if name := _undoable(architecture, config):
        known = {**architecture.only, **architecture.must}[name]
        raise UserError(
            f"config.json has {name}={shown(config.get(name))}, which llmjax cannot do in {architecture.name}; use a "
            f"model of {name}={' or '.join(map(repr, known))}"
        )
    settings, names = dict(architecture.fixed), dict[str, str]()
    for name, key in architecture.keys.items():
        value = config.get(name, config.get(key.also, key.default))
        if value is None:
            value = config.get(key.also, key.default) if key.none is ... else key.none
        value = typed(name, value, key.default)
        if key.ours in names and settings[key.ours] != value:
            raise UserError(
                f"config.json has {name}={value} and {names[key.ours]}={settings[key.ours]}, which are one key here, "
                f"{key.ours}; use a model in which they are equal"
            )
        settings[key.ours], names[key.ours] = value, name
    if architecture.scales_tied:
        tied = typed("tie_word_embeddings", config.get("tie_word_embeddings", True), True)
        scaled = typed("scale_decoder_outputs", config.get("scale_decoder_outputs", tied), True)
        settings |= dict(zip(SCALES_TIED, (tied, scaled), strict=True))
    if architecture.alternates:
        settings["transformer.global_every"] = read_period(config, architecture.alternates)
    if architecture.rope:
        settings |= read_rope(config, architecture.rope, architecture.local_rope)
    return settings


def vocab_size_of(config: Mapping[str, Any]) -> int:
    """The number of ids that the model knows."""
    return typed("vocab_size", config.get("vocab_size"), 0)


def not_read(architecture: Architecture, config: Mapping[str, Any]) -> list[str]:
    """The keys of a config.json that no table mentions, for the certificate."""
    windows = set(WINDOW_KEYS) if architecture.alternates else set()
    also = {key.also for key in architecture.keys.values()}
    also |= {START} if architecture.encoder else set()
    also |= {"tie_word_embeddings", "scale_decoder_outputs"} if architecture.scales_tied else set()
    told = architecture.keys.keys() | architecture.only.keys() | architecture.must.keys()
    return sorted(config.keys() - GENERAL - windows - told - also)


def choose_architecture(
    settings: Mapping[str, Any],
    tables: Mapping[str, Architecture] = ARCHITECTURES,
    where: str = "models of transformers",
) -> Architecture:
    """The first of the name tables that can hold a model of these keys.

    Raises UserError, which names what the nearest of them lacks, if there is none. `where` says what they belong to.
    """
    lacking = {name: _lacking(architecture, settings) for name, architecture in tables.items()}
    # A model of another kind is further away than one with any number of other keys.
    kinds = {"model.family", "experts.num_experts"}
    name = min(lacking, key=lambda name: (bool(kinds & lacking[name].keys()), len(lacking[name])))
    if lacking[name]:
        key, value = next(iter(lacking[name].items()))
        raise UserError(
            f"{key}={settings[key]!r} is not what {where} have, of which {name} with {key}={value!r} is "
            f"the nearest; there are tables for {', '.join(tables)}"
        )
    return tables[name]


def _lacking(architecture: Architecture, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys whose values models of the architecture do not have, with the values that they have."""
    family = architecture.fixed["model.family"]
    if settings["model.family"] != family:
        return {"model.family": family}
    found = dict(settings)
    # Sizes that are what they would be without their keys count as 0.
    if found["transformer.num_kv_heads"] == found["transformer.num_heads"]:
        found["transformer.num_kv_heads"] = 0
    if found["transformer.head_dim"] * found["transformer.num_heads"] == found["model.model_dim"]:
        found["transformer.head_dim"] = 0
    if found["transformer.score_dim"] == settings["transformer.head_dim"]:
        found["transformer.score_dim"] = 0
    experts = "experts.num_experts"
    if experts not in architecture.fixed and not found.get(experts):
        return {experts: next(key.default for key in architecture.keys.values() if key.ours == experts)}
    return {key: value for key, value in architecture.fixed.items() if found.get(key, value) != value}


def write_config(
    architecture: Architecture,
    settings: Mapping[str, Any],
    vocab_size: int,
    ids: Mapping[str, int],
    dtype: str,
) -> dict[str, Any]:
    """The config.json of a model with these keys. `ids` are those of `TOKEN_IDS`; `dtype` is that of the weights."""
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "torch_dtype": dtype,
        **{name: ids[name] for name in TOKEN_IDS},
    }
    for name, key in architecture.keys.items():
        value = settings[key.ours]
        if key.ours == "transformer.score_dim":
            value = value or settings["transformer.head_dim"]
        # A size of 0 is one that follows from others, as it does there without the key.
        if value != 0 or type(value) is bool or key.none is not ...:
            config[name] = None if value == key.none else value
    config |= {name: known[0] for name, known in {**architecture.only, **architecture.must}.items()}
    if architecture.encoder:
        config[START] = ids.get(START, ids["bos_token_id"])
    if architecture.scales_tied:
        tied, scaled = (settings[key] for key in SCALES_TIED)
        if scaled and not tied:
            raise UserError(
                f"encoder_decoder.scale_output=True with model.tie_embeddings=False is not what {architecture.name} "
                "has, which scales the states for the embedding alone; export a model with both or neither"
            )
        # Version 4 of transformers reads from the first key whether to scale, and version 5 from the second.
        config |= {"tie_word_embeddings": scaled, "scale_decoder_outputs": scaled}
    if architecture.alternates:
        every = settings["transformer.global_every"]
        config |= {
            "layer_types": layer_types(settings["model.num_layers"], every),
            "sliding_window_pattern": every,
        }
    if architecture.rope:
        config |= write_rope(settings)
    return config


def accounted(architecture: Architecture) -> set[str]:
    """All keys of the sections of its family that the table says something about, which must be all there are."""
    keys = {key.ours for key in architecture.keys.values()} | set(architecture.fixed) | set(FREE)
    # Without rotary positions, these have no effect.
    keys |= {f"transformer.{key}" for key in ROPE_KEYS}
    keys |= {"transformer.global_every", "transformer.local_rope_theta"}
    keys |= set(SCALES_TIED) if architecture.scales_tied else set()
    # Further loss terms are of training alone. Without experts no key of theirs has an effect.
    keys |= {"experts.balance_loss", "experts.router_z_loss"}
    if architecture.fixed.get("experts.num_experts") == 0:
        return keys | {f"experts.{field.name}" for field in dataclasses.fields(ExpertsConfig)}
    return keys | {"transformer.mlp_dim"}
