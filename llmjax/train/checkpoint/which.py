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


# The mean of the parameters of the newest checkpoints, such as average:5.
AVERAGE = re.compile("average:([2-9]|[1-9][0-9]{1,3})")


def check_name(key: str, name: str) -> None:
    """UserError where the value `name` of `key` is neither latest, best, the number of an update nor an average."""
    known = name in ("latest", "best") or AVERAGE.fullmatch(name)
    if not known and not re.fullmatch("0|[1-9][0-9]{0,18}", name):
        raise UserError(
            f"{key}={shown(name)} is neither latest, best, the number of an update nor an average of several; give one "
            "of these, such as latest, 400 or average:3"
        )


def named_updates(checkpoints: Ranked, key: str, name: str) -> list[int | None]:
    """The updates that `name` means, None for the latest: one, or those whose parameters are to be averaged.

    Raises UserError where it is the best and none has a loss, and where there are fewer checkpoints than are averaged.
    """
    check_name(key, name)
    if not (average := AVERAGE.fullmatch(name)):
        return [_named_update(checkpoints, key, name)]
    count, found = int(average[1]), checkpoints.updates()
    if len(found) < count:
        raise UserError(
            f"{key}={name} averages {count} checkpoints, and {checkpoints.directory} holds {len(found)}; give a "
            "smaller number, or keep more by checkpoint.keep in a run"
        )
    return list(found[-count:])


def _named_update(checkpoints: Ranked, key: str, name: str) -> int | None:
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
