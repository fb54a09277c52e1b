"""What is known about each checkpoint, some of it found out only after it was saved, and which of them are kept.

A checkpoint is saved before its parameters are evaluated, so that nothing that an evaluation does can lose it. What
is found out later lies beside its arrays in a small file of its own, and is deleted with them.
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

AMENDED = "amended.json"  # in the folder of a checkpoint


class Keeping(Protocol):
    """The part of `checkpoint.CheckpointConfig` that says what is kept."""

    @property
    def keep(self) -> int: ...

    @property
    def keep_best(self) -> bool: ...


OLD_RANK = "held_out_loss"  # what older versions call the rank in their meta


@dataclasses.dataclass(frozen=True)
class Facts:
    """What decides whether a checkpoint is kept.

    rank         what checkpoints are ordered by: the lowest is the best. Finite; None where it was not evaluated
    finite_loss    whether a finite loss has been seen with its parameters: True, False where all that was seen since
                   was not finite, None where nothing was seen yet
    spare          saved for the sake of an evaluation that follows, apart from the cadence of checkpoints
    """

    rank: float | None = None
    finite_loss: bool | None = None
    spare: bool = False

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Facts:
        """The facts in the meta of a checkpoint; what it does not say is not known."""
        return cls().amended(meta)

    def amended(self, meta: Mapping[str, Any]) -> Facts:
        """The facts with what `meta` adds to them."""
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

    The newest good one is the last with whose parameters a finite loss has been seen: what is newer may turn out to
    be worth nothing.
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
    """What was added to the meta of a checkpoint after it was saved; nothing where that was damaged since.

    Without it a checkpoint is as good as it was, only less is known of it.
    """
    path = Path(directory) / str(update) / AMENDED
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if values.pop(DIGEST) == of_json(values) else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def write_amended(directory: str, update: int, values: Mapping[str, Any]) -> None:
    """Adds `values` to what was amended before, in one step."""
    path = Path(directory) / str(update) / AMENDED
    new = json.loads(json.dumps(read_amended(directory, update) | dict(values)))
    write_atomically(path, json.dumps(new | {DIGEST: of_json(new)}))
