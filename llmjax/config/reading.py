"""The one reader of config files and of saved configs: nested mappings become a `Config`.

A config file has every key. The config.json of an older run lacks the keys that are newer than the run. They take the
value of the `Unset` beside the key, which says what the runs did that did not know it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.config.moved import MOVED, new_name
from llmjax.config.schema import Config
from llmjax.data.sources.listing import split_sources
from llmjax.errors import UserError
from llmjax.ranges import older, shown
from llmjax.tasks.table import SECTIONS as TASK_SECTIONS
from llmjax.train.optim.optimizers.table import OPTIMIZERS


def read_config(raw: Mapping[str, Any]) -> Config:
    """The Config of nested mappings that have every key; UserError names the first wrong one."""
    return _read_section(Config, raw, "")


def complete_config(saved: Mapping[str, Any], workdir: Any) -> dict[str, Any]:
    """The saved config of the run in `workdir` with every key of today.

    UserError for a key that is not known, as a newer version of llmjax writes it, and for a missing key that every
    version has written.
    """
    return _complete_section(Config, _with_names_of_now(saved), "", f"{workdir}/config.json")


def _with_names_of_now(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """`saved` with the keys of `MOVED` under their new names."""
    # A section that is no section is named by whoever reads on.
    if not all(isinstance(values, Mapping) for name, values in saved.items() if name != "seed"):
        return saved
    renamed = {
        name: dict(values) if isinstance(values, Mapping) else values for name, values in saved.items()
    }
    optimizer = renamed.get("optimizer", {}).get("name")
    for old in MOVED:
        section, key = old.split(".")
        if key not in renamed.get(section, {}):
            continue
        value, new = renamed[section].pop(key), new_name(old, optimizer)
        if new is not None:
            new_section, new_key = new.split(".")
            renamed.setdefault(new_section, {})[new_key] = value
    return renamed


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return typing.get_type_hints(cls)


def _complete_section(cls: type, saved: Any, section: str, path: str) -> dict[str, Any]:
    """The keys of the dataclass `cls` from `saved`, and the value of `Unset` for the keys that `saved` lacks."""
    prefix = f"{section}." if section else ""
    if not isinstance(saved, Mapping):
        raise UserError(f"{path} has {section}={shown(saved)}, which is no section of keys; restore the file")
    hints, defaults = _hints(cls), older(cls)
    for key in saved:
        if key not in hints:
            raise UserError(
                f"{path} has the key {prefix}{key}, which this version of llmjax does not know"
                f"{did_you_mean(key, hints)}; use the version that wrote it"
            )
    values: dict[str, Any] = {}
    for key in hints:
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _complete_section(hints[key], saved.get(key, {}), prefix + key, path)
        elif key in saved:
            values[key] = saved[key]
        elif key in defaults:
            values[key] = list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key]
        else:
            raise UserError(f"{path} lacks the key {prefix}{key}, which every run has; restore the file")
    return values


def read_optimizer(saved: Mapping[str, Any], workdir: Any) -> dict[str, Any]:
    """The section `optimizer` and the sections of all optimizers in the saved config of the run in `workdir`."""
    complete, hints = complete_config(saved, workdir), _hints(Config)
    return {
        name: _read_section(hints[name], complete[name], f"{name}.") for name in ("optimizer", *OPTIMIZERS)
    }


def read_tuning(saved: Mapping[str, Any], workdir: Any, train: Any) -> dict[str, Any]:
    """What the saved config of the run in `workdir` says of which parameters train: `lora`, and train.frozen.

    `train` is the section `train` of another config, which comes back with train.frozen of the saved one.
    """
    complete = complete_config(saved, workdir)
    lora = _read_section(_hints(Config)["lora"], complete["lora"], "lora.")
    return {"lora": lora, "train": dataclasses.replace(train, frozen=tuple(complete["train"]["frozen"]))}


def read_task(saved: Mapping[str, Any], workdir: Any) -> dict[str, Any]:
    """The section `task` and the sections of all tasks in the saved config of the run in `workdir`."""
    complete, hints = complete_config(saved, workdir), _hints(Config)
    return {name: _read_section(hints[name], complete[name], f"{name}.") for name in ("task", *TASK_SECTIONS)}


def _read_section(cls: type, raw: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass `cls` with the values of `raw`, which must have exactly its keys."""
    hints = _hints(cls)
    for key in raw:
        if key not in hints:
            raise UserError(f"config key {prefix}{key} is not known{did_you_mean(key, hints)}")
    missing = [key for key in hints if key not in raw]
    if missing:
        raise UserError(
            f"config key {prefix}{missing[0]} is missing; start from configs/base.py, which lists every key"
        )
    values = {}
    for key, hint in hints.items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(raw[key], Mapping):
                raise UserError(
                    f"config key {prefix}{key}={shown(raw[key])} must be a section of keys; start from configs/base.py"
                )
            values[key] = _read_section(hint, raw[key], f"{prefix}{key}.")
        else:
            values[key] = _read_value(raw[key], hint, prefix + key)
    return cls(**values)


def _read_value(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`; UserError where it is of another type.

    An int may stand for a float, one string for a tuple of strings, and strings for the whole numbers of a tuple.
    """
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            # No float is so large. The check of the key's range names it, with the int as the user wrote it.
            return value
    if hint == tuple[int, ...]:
        values = value if isinstance(value, list | tuple) else (value,)
        if (numbers := _whole_numbers(values)) is not None:
            return numbers
    elif typing.get_origin(hint) is tuple:
        values = (value,) if isinstance(value, str) else value
        if isinstance(values, list | tuple) and all(isinstance(v, str) for v in values):
            _check_text(value, values, key)
            # Several values are whole as they are. A single one may be what the command line was given.
            if key in WHOLE and len(values) > 1:
                return tuple(values)
            split = SPLIT.get(key, _split_at_commas)
            return tuple(part for v in values for part in split(v))
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if isinstance(value, str):
            _check_text(value, (value,), key)
        return value
    lists = {tuple[int, ...]: "list of whole numbers"}
    name = hint.__name__ if isinstance(hint, type) else lists.get(hint, "list of strings")
    raise UserError(f"{key}={shown(value)} is of type {type(value).__name__}; give a value of type {name}")


def _split_at_commas(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


# Lists whose parts may hold commas -> what tells them apart.
SPLIT = {"data.sources": split_sources, "data.held_out_sources": split_sources}


# Lists whose values may hold commas if there are several of them.
WHOLE = ("classification.labels", "data.columns")


def _whole_numbers(values: Sequence[Any]) -> tuple[int, ...] | None:
    """The whole numbers in `values`, each a number or a text of numbers with commas between; None for anything else."""
    if not all(isinstance(v, int | str) and not isinstance(v, bool) for v in values):
        return None
    parts: list[Any] = []
    for v in values:
        parts += [part for part in v.split(",") if part] if isinstance(v, str) else [v]
    try:
        return tuple(map(int, parts))
    except ValueError:
        return None


def _check_text(value: Any, texts: Sequence[str], key: str) -> None:
    """UserError where one of `texts` has the character of code 0, at which the operating system would end it."""
    if any("\0" in text for text in texts):
        raise UserError(
            f"{key}={shown(value)} has a character of code 0, which no name can hold; leave it out"
        )


def did_you_mean(word: str, words: typing.Iterable[str]) -> str:
    """The end of an error message that asks whether the most similar of `words` was meant; "" where none is similar."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
