"""Which checkpoint is meant: the names that a user may give one, by `--checkpoint` or checkpoint.init_checkpoint."""

from __future__ import annotations

import re
from typing import Protocol

from llmjax.errors import UserError
from llmjax.ranges import shown


class Ranked(Protocol):
    """What is asked of `checkpoint.Checkpoints`."""

    directory: str

    def updates(self) -> list[int]: ...

    def best(self) -> int | None: ...


def check_name(key: str, name: str) -> None:
    """UserError where the value `name` of `key` is neither latest, best nor the number of an update."""
    if name not in ("latest", "best") and not re.fullmatch("0|[1-9][0-9]{0,18}", name):
        raise UserError(
            f"{key}={shown(name)} is neither latest, best nor the number of an update; give one of these, "
            "such as latest or 400"
        )


def named_update(checkpoints: Ranked, key: str, name: str) -> int | None:
    """The update that `name` means, None for the latest; UserError where it is the best and none has a loss."""
    check_name(key, name)
    if name == "latest":
        return None
    if name != "best":
        return int(name)
    best = checkpoints.best()
    if best is None and (found := checkpoints.updates()):
        text = ", ".join(map(str, found))
        raise UserError(
            f"{key}=best, but no checkpoint in {checkpoints.directory} has a held-out loss to be the best by; use "
            f"latest or the number of one: {text}"
        )
    return best
