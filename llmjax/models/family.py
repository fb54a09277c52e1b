"""What a model family tells the rest of the package: its class, its sections of the config, and their rules.

A family is one file in this folder, one line in `table.py` and the lines of its section, if it has one, in
configs/base.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.models.contract import Model
from llmjax.nn.config import ModelConfig
from llmjax.nn.layer_compute import LayerCompute

# The sections of all families, by their names.
Sections = Mapping[str, Any]


def _as_they_are(model: ModelConfig, sections: Sections, seq_len: int, compute: LayerCompute) -> Sections:
    return sections


def _only_model(model: ModelConfig, sections: Sections) -> Any:
    return model


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family. Everything but `model` may be left out by a family that has no such thing.

    model           called with the fields of `GPT`, in their order and by their names
    sections        the sections of the config that the family reads besides `model`, with their dataclasses
    compute         the keys of the section `compute` that it reads, of those in `LayerCompute`
    resolve         (model, sections, data.seq_len, compute) -> the sections with derived sizes filled in; UserError
                    for keys that contradict each other
    config          (model, sections) -> the first argument of `model`
    split           (sections) -> the sizes that mesh.tensor must divide, by their whole keys
    rows            (sections) -> the sizes that mesh.fsdp must divide, besides model.model_dim
    heads           (sections) -> the numbers of query heads and of key/value heads, or None for a family without
                    attention, whose sequences cannot be split over mesh.seq
    position_bias   (sections) -> whether attention adds a bias to its scores by the distance of two tokens
    position_table  (sections) -> the setting by which documents may not be longer than data.seq_len, as
                    `key='value'`; "" where they may
    sees_both_sides whether a token sees those after it, so that the family cannot predict the next one
    reads_source    whether the family reads a second text beside the one that it predicts, as in translation. Only
                    tasks that have one can train it, and they can train no other family
    optional        keys that are True or False, with the entry of the tree of parameters that each of them adds. The
                    entry serves the prediction of tokens alone, so that a run may begin with the parameters of a model
                    without it, and make it anew
    free_on_init    the keys of `sections`, with the name of their section, that do not shape the parameters, so that
                    a run may begin with the parameters of a run that has another value
    """

    model: Callable[..., Model]
    sections: Mapping[str, type] = dataclasses.field(default_factory=dict)
    compute: tuple[str, ...] = ()
    resolve: Callable[[ModelConfig, Sections, int, LayerCompute], Sections] = _as_they_are
    config: Callable[[ModelConfig, Sections], Any] = _only_model
    split: Callable[[Sections], Mapping[str, int]] = lambda sections: {}
    rows: Callable[[Sections], Mapping[str, int]] = lambda sections: {}
    heads: Callable[[Sections], tuple[int, int] | None] = lambda sections: None
    position_bias: Callable[[Sections], bool] = lambda sections: False
    position_table: Callable[[Sections], str] = lambda sections: ""
    sees_both_sides: bool = False
    reads_source: bool = False
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    free_on_init: tuple[str, ...] = ()
