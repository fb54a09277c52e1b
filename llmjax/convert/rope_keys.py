"""Rotary positions as config.json says them: the base of the wavelengths, and their scaling to longer texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmjax.convert.files.json_file import typed
from llmjax.convert.window_keys import WITH, WITHOUT
from llmjax.errors import UserError
from llmjax.ranges import shown

# The scalings that both sides know -> what must stand beside them there, as ours have it: name -> (with or without).
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {},
    "yarn": {
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
    "llama3": {"low_freq_factor": 1, "high_freq_factor": 4},
}
# Their names for the same.
NAMES = {"default": "none"}


def read_rope(config: Mapping[str, Any], theta: float, local_theta: float = 0.0) -> dict[str, Any]:
    """Our keys for the rotary positions of a config.json. `theta` is the base if it says none.

    `local_theta` is the base of layers with a window if it says none, and 0 if they have no base of their own.

    Version 5 of transformers writes one table, rope_parameters; others write rope_theta and rope_scaling. Raises
    UserError for a scaling that we do not have.
    """
    scaling: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None:
            scaling |= typed(key, config[key], {})
    if local_theta:
        local = typed(WITH, scaling.pop(WITH, {}), {})
        scaling |= typed(WITHOUT, scaling.pop(WITHOUT, {}), {})
        base = local.get("rope_theta", config.get("rope_local_base_freq"))
        found = rope_settings(
            {key: value for key, value in local.items() if key != "rope_theta"}, local_theta
        )
        if found["transformer.rope_scaling"] != "none":
            raise UserError(
                "config.json scales the rotary positions of layers with a window; use a model without it"
            )
        theirs = local_theta if base is None else base
        return {
            **read_rope({**config, "rope_parameters": scaling, "rope_scaling": None}, theta),
            "transformer.local_rope_theta": typed("rope_local_base_freq", theirs, 1.0),
        }
    base = scaling.pop("rope_theta", config.get("rope_theta"))
    return rope_settings(scaling, theta if base is None else base)


def rope_settings(scaling: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    """Our keys for a table of transformers about the scaling, with `rope_type` or `type`, and the base."""
    rest = dict(scaling)
    names = [typed(key, rest.pop(key), "") for key in ("rope_type", "type") if key in rest]
    kind = NAMES.get(names[0], names[0]) if names else "none"
    if kind not in SCALINGS:
        raise UserError(
            f"config.json has rope_type={shown(kind)}, which is not known here; use a model with one of "
            f"{', '.join([*NAMES, *list(SCALINGS)[1:]])}"
        )
    factor, length = rest.pop("factor", 1.0), rest.pop("original_max_position_embeddings", 0)
    for key, value in SCALINGS[kind].items():
        found = rest.pop(key, value)
        if found is not None and found != value:
            raise UserError(
                f"config.json has {key}={shown(found)} for rope_type={kind!r}, which is {value!r} here; use a model "
                "with that value"
            )
    if unknown := [key for key, value in rest.items() if value is not None]:
        raise UserError(
            f"config.json has {shown(unknown[0])}: {shown(rest[unknown[0]])} for its rotary positions, which is not "
            "known here; use a model without it"
        )
    reads_length = kind in ("yarn", "llama3")
    return {
        "transformer.rope_theta": typed("rope_theta", theta, 1.0),
        "transformer.rope_scaling": kind,
        "transformer.rope_factor": 1.0 if kind == "none" else typed("factor", factor, 1.0),
        "transformer.rope_original_len": typed("original_max_position_embeddings", length, 0)
        if reads_length
        else 0,
    }


def write_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for our keys. UserError for a scaling that transformers does not have."""
    kind = settings["transformer.rope_scaling"]
    keys: dict[str, Any] = {"rope_theta": settings["transformer.rope_theta"]}
    if kind not in SCALINGS:
        raise UserError(
            f"transformer.rope_scaling={kind!r} has no equal in transformers; export a model with one of "
            f"{', '.join(SCALINGS)}"
        )
    if kind != "none":
        scaling = {"rope_type": kind, "factor": settings["transformer.rope_factor"], **SCALINGS[kind]}
        if kind in ("yarn", "llama3"):
            scaling["original_max_position_embeddings"] = settings["transformer.rope_original_len"]
        keys["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}
    if local := settings.get("transformer.local_rope_theta"):
        keys["rope_local_base_freq"] = local
    return keys
