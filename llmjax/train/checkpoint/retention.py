"""Which checkpoints are kept, and the facts about each of them that decide it.

A checkpoint is saved before its parameters are evaluated, so that a failing evaluation cannot lose it. What is found
out later is written to a small file beside its arrays, and is deleted with them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmjax.files import write_atomically
from llmjax.train.checkpoint.digests import of_json
from llmjax.train.checkpoint.shelf import DIGEST

# In the folder of a checkpoint.
AMENDED = "amended.json"


class Keeping(Protocol):
    """The part of `checkpoint.CheckpointConfig` that says what is kept."""

    @property
    def keep(self) -> int: ...

    @property
    def keep_best(self) -> bool: ...


# The key under which older versions wrote the rank.
OLD_RANK = "held_out_loss"


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts that decide whether a checkpoint is kept.

    rank         orders the checkpoints: the lowest is the best. A finite number; None where it was not evaluated
    finite_loss  True where its parameters have given a finite loss, False where they gave only losses that were not
                 finite, None where they gave none yet
    spare        it was saved only because an evaluation follows, and not because checkpoint.every asked for it
    """

    rank: float | None = None
    finite_loss: bool | None = None
    spare: bool = False

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Facts:
        """The facts in the meta of a checkpoint. What the meta does not say counts as unknown."""
        return cls().amended(meta)

    def amended(self, meta: Mapping[str, Any]) -> Facts:
        """These facts, updated by those that `meta` holds."""
        if OLD_RANK in meta:
            meta = {"rank": meta[OLD_RANK], **meta}
        known = {field.name: meta[field.name] for field in dataclasses.fields(self) if field.name in meta}
        rank = known.get("rank")
        if rank is not None and not math.isfinite(rank):
            known["rank"] = None
        return dataclasses.replace(self, **known)


def best_of(updates: Sequence[int], facts: Mapping[int, Facts]) -> int | None:
    """The update of lowest rank, the earliest of equals; None where none was evaluated."""
    losses = {
        update: rank
        for update in sorted(updates)
        if update in facts and (rank := facts[update].rank) is not None
    }
    return min(losses, key=losses.__getitem__, default=None)


def kept(updates: Sequence[int], facts: Mapping[int, Facts], config: Keeping) -> set[int]:
    """Which checkpoints stay: the newest, the newest `keep` that are not spare, the best, and the newest good one.

    The newest good one is the last whose parameters have given a finite loss. Newer ones may turn out to give none.
    """
    known = {update: facts.get(update, Facts()) for update in sorted(updates)}
    usable = [update for update, fact in known.items() if fact.finite_loss is not False]
    stay = set([update for update in usable if not known[update].spare][-config.keep :])
    stay |= set([update for update in usable if known[update].finite_loss is True][-1:])
    # The newest was not evaluated yet, so it may still become the best.
    stay |= set([update for update in usable[-1:] if known[update].rank is None])
    stay |= {update for update in known if not usable or update > usable[-1]}
    if config.keep_best and (best := best_of(usable, facts)) is not None:
        stay.add(best)
    return stay


def read_amended(directory: str, update: int) -> dict[str, Any]:
    """The values that were amended to a checkpoint's meta; empty where there are none or their file is damaged.

    Losing them does not harm the checkpoint; only less is known of it.
    """
    path = Path(directory) / str(update) / AMENDED
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if values.pop(DIGEST) == of_json(values) else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def write_amended(directory: str, update: int, values: Mapping[str, Any]) -> None:
    """Adds `values` to those amended before, in one step."""
    path = Path(directory) / str(update) / AMENDED
    new = json.loads(json.dumps(read_amended(directory, update) | dict(values)))
    write_atomically(path, json.dumps(new | {DIGEST: of_json(new)}))
