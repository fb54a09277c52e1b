"""docs/families.md says what the presets and the families are."""

import importlib
import pathlib
import re

import pytest
from families import goes_with

from configs.base import get_config
from llmjax.config.reading import read_config
from llmjax.models.table import FAMILIES
from llmjax.tasks.table import TASKS

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| `")
]
PRESETS = {row[0].strip("`"): row[1:] for row in ROWS if len(row) == 10}
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def test_every_preset_is_listed():
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_as_the_table_says(name):
    config = read_config(importlib.import_module(f"configs.{name}").get_config().to_dict())
    family = FAMILIES[config.model.family]
    shown = [config.model.family, config.model.num_layers, config.model.model_dim]
    if "transformer" in family.sections:
        sections = family.resolve(config.model, config.families, config.data.seq_len, config.compute)
        t = sections["transformer"]
        position = t.position if t.rope_scaling == "none" else f"{t.position}, {t.rope_scaling}"
        shown += [t.num_heads, t.num_kv_heads, position, t.norm, t.activation, t.window or ""]
    else:
        shown += [""] * 6
    assert PRESETS[name] == [str(value) for value in shown]


def test_families_go_with_tasks_as_the_table_says():
    rows = {row[0].strip("`"): row for row in ROWS if len(row) == 4 and "." not in row[0]}
    assert rows.keys() == FAMILIES.keys()
    for name, row in rows.items():
        tasks = [task for task in TASKS if goes_with(name, task)]
        assert sorted(re.findall(r"`(\w+)`", row[2])) == sorted(tasks)
        assert re.findall(r"`(\w+)\.\*`", row[3]) == list(FAMILIES[name].sections)


def test_keys_that_the_page_names_are_keys():
    keys = {
        f"{section}.{key}"
        for section, values in get_config().to_dict().items()
        if section != "seed"
        for key in values
    }
    named = set(re.findall(r"`(?:--config\.)?([a-z_]+\.[a-z_]+)(?:=\w+)?`", TEXT))
    assert named and named <= keys, named - keys
