"""Finds a config file and runs it, in any folder and after any kind of installation."""

from __future__ import annotations

import contextlib
import pathlib
import re
import runpy
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

import llmjax
from llmjax.config.moved import new_names
from llmjax.errors import UserError, reason_of

PACKAGE = pathlib.Path(llmjax.__file__).parent
# Where the configs that come with llmjax lie: beside the package in a checkout, inside of it when it is installed.
SHIPPED = (PACKAGE.parent / "configs", PACKAGE / "configs")


def shipped_configs() -> pathlib.Path:
    """The folder of the configs that come with llmjax."""
    return next((folder for folder in SHIPPED if (folder / "base.py").is_file()), SHIPPED[0])


def find_config(name: str) -> pathlib.Path:
    """The config file that `name` means: a path, or the name of a shipped config such as `base` or `configs/base.py`.

    Raises UserError where there is no such file.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.parent in (pathlib.Path(), pathlib.Path("configs")):
        candidate = shipped / f"{path.name.removesuffix('.py')}.py"
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(file.stem for file in shipped.glob("*.py") if file.stem != "__init__"))
    raise UserError(
        f"--config={name} does not exist; give the path of a config file, or the name of one that comes with llmjax: "
        f"{names}"
    )


def load_config_file(name: str) -> dict[str, Any]:
    """What `get_config()` of the config file `name` returns, as nested dicts.

    `path.py:argument` hands an argument to `get_config`. Raises UserError where the file is missing, fails, or returns
    something else than a ConfigDict.
    """
    file, *arguments = name.split(":", 1)
    path = find_config(file)
    try:
        with _configs_importable(path.parent):
            config = runpy.run_path(str(path))["get_config"](*arguments)
    except Exception as error:  # a config file is Python: whatever can go wrong in it
        if unknown := re.search('Key "(.+?)" does not exist(?:.*Did you mean "(.+?)")?', str(error), re.S):
            key, close = unknown.groups()
            hint = f"; did you mean {close!r}?" if close else ""
            if moved := new_names(key):
                hint = f"; it has moved to {' or '.join(moved)}"
            raise UserError(f"--config={name} sets the key {key!r}, which is not known{hint}") from None
        raise UserError(
            f"--config={name} fails with {type(error).__name__} ({reason_of(error)}); correct the file"
        ) from None
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(
            f"get_config() of --config={name} returns a {kind}; return the ConfigDict of configs/base.py"
        )
    return config.to_dict()


def plain_dict(config: Any) -> dict[str, Any]:
    """A config that was made in Python, a ConfigDict or nested dicts, as nested dicts of its own.

    Raises UserError for anything else.
    """
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if not isinstance(config, Mapping):
        raise UserError(
            f"config={repr(config)[:60]} is no config; give a config file, or the name of one, such as 'base'"
        )
    return {
        name: dict(section) if isinstance(section, Mapping) else section for name, section in config.items()
    }


@contextlib.contextmanager
def _configs_importable(folder: pathlib.Path) -> Iterator[None]:
    """Within it, `from configs import base` finds the files beside the config, and then the shipped ones.

    The name is taken away afterwards, with the modules that were found under it: another config file may lie beside
    another base.
    """
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_configs(name)}
    package = types.ModuleType("configs")
    package.__path__ = [str(folder.resolve()), str(shipped_configs())]
    sys.modules["configs"] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_configs(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_configs(module: str) -> bool:
    return module.split(".")[0] == "configs"
