"""The config of a model that comes from another program: configs/base.py with the keys that its files decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmjax.config.file import load_config_file
from llmjax.config.reading import read_config
from llmjax.config.schema import Config
from llmjax.models.table import FAMILIES
from llmjax.tasks.table import TASKS

# The sequences of an update. A choice: nothing is trained with this config, but any usual number of devices must divide
# it, since every mode checks that they share the work.
SEQUENCES = 8


def imported_config(settings: Mapping[str, Any], tokenizer: str = "") -> Config:
    """The config for `settings`, our keys that `convert.source.Source` has, and the path of a tokenizer.

    Keys about training are those of configs/base.py, but for the size of an update. UserError for settings that no
    config may have.
    """
    raw = load_config_file("base")
    for key, value in settings.items():
        section, name = key.split(".")
        raw[section][name] = value
    # A window that is longer than all texts is no mistake here: it cuts off nothing.
    seq_len = max(raw["data"]["seq_len"], raw["transformer"]["window"])
    raw["data"]["seq_len"] = seq_len
    raw["train"]["tokens_per_update"] = SEQUENCES * seq_len
    raw["compute"]["accumulation_steps"] = 1
    raw["tokenizer"]["path"] = tokenizer
    sees = FAMILIES[raw["model"]["family"]].sees_both_sides
    # As far as they are known here, models that see both sides were trained with [SEP] at the end of each text.
    raw["embed"]["read_end"] = sees
    reads = FAMILIES[raw["model"]["family"]].reads_source
    raw["task"]["name"] = next(
        name
        for name, task in TASKS.items()
        if task.sees_both_sides == sees and (task.use == "translate") == reads
    )
    return read_config(raw)


def settings_of(config: Config) -> dict[str, Any]:
    """The keys of a resolved `config` that decide what its model is, as `settings` of `imported_config`."""
    values = config.to_dict()
    settings = {
        f"{section}.{key}": value
        for section in ("model", *FAMILIES[config.model.family].sections)
        for key, value in values[section].items()
    }
    return {**settings, "data.seq_len": config.data.seq_len}
