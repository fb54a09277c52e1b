"""Which layers of a model have a window, as config.json says it: a list of layer types, or a period."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmjax.convert.files.json_file import typed
from llmjax.errors import UserError

WITH, WITHOUT = "sliding_attention", "full_attention"
# The period of layers without a window, in versions that have no list of layer types.
PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")
KEYS = ("layer_types", *PERIODS)


def read_period(config: Mapping[str, Any], default: int) -> int:
    """`transformer.global_every`: counting from 1, every layer whose number is a multiple of it has no window.

    Raises UserError if the layers without a window do not repeat so.
    """
    periods = [typed(key, config[key], 0) for key in PERIODS if config.get(key) is not None]
    period = periods[0] if periods else default
    if config.get("layer_types") is None:
        return period
    types = typed("layer_types", config["layer_types"], [])
    period = types.index(WITHOUT) + 1 if WITHOUT in types else max(period, len(types) + 1)
    if types != layer_types(len(types), period):
        raise UserError(
            "config.json has layer_types in which the layers without a window are not every n-th; use a model in which "
            "they are"
        )
    return period


def layer_types(num_layers: int, period: int) -> list[str]:
    """The list for `transformer.global_every`."""
    return [WITHOUT if period and i % period == 0 else WITH for i in range(1, num_layers + 1)]
