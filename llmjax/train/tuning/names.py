"""Parameters chosen by their names, as in `lora.targets` and `train.frozen`.

A parameter lies at a path such as layers/attention/wq_DNH. Any part of the path names it, with or without the letters
of its dimensions: `attention`, `wq`, `attention/wq_DNH`. A dot may stand for the slash, and `*` for any letters.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from llmjax.errors import UserError
from llmjax.train.trees import Path


def choose_paths(key: str, pattern: str, paths: Iterable[Path]) -> set[Path]:
    """The paths that `pattern` names. Raises UserError, which lists the names there are, if it names none.

    key  the config key that has the pattern among its values
    """
    known = list(paths)
    wanted = pattern.replace(".", "/")
    found = {path for path in known if any(fnmatch.fnmatchcase(name, wanted) for name in _names(path))}
    if not found:
        names = dict.fromkeys(_short(part) for path in known for part in path)
        raise UserError(
            f"{key} has {pattern!r}, which names no parameter that it can have; use some of {', '.join(names)}, or all"
        )
    return found


def _names(path: Path) -> set[str]:
    """Everything that names the parameter at `path`."""
    ends = range(1, len(path) + 1)
    runs = [path[start:end] for end in ends for start in range(end)]
    names = {"/".join(run) for run in runs} | {"/".join((*run[:-1], _short(run[-1]))) for run in runs}
    return names | {"all"}


def _short(name: str) -> str:
    """A name without the letters of its dimensions: wq for wq_DNH."""
    stem, _, letters = name.rpartition("_")
    return stem if stem and letters.isupper() else name
