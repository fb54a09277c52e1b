"""The frozen parameters of a run, which its workdir holds once, beside checkpoints that hold only what trains.

A run writes them before its first update, so that it needs neither the model that it began with nor the disk space of
a model for each checkpoint. Each checkpoint names them by a fingerprint, and is not used with others.
"""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from llmjax.build.program import Program
from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.parallel.agreement import from_primary, on_primary
from llmjax.train.checkpoint import digests, shelf
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.checkpoint.config import CheckpointConfig
from llmjax.train.update.state import TrainState
from llmjax.types import Params

# The folder of a workdir, in which they lie as the checkpoint of update 0.
FOLDER = "frozen"
# The name of their fingerprint in what a checkpoint says of itself.
META = "frozen"
_ONE = CheckpointConfig(every=0, keep=1, keep_best=False)


def save_frozen(program: Program, state: TrainState, workdir: pathlib.Path) -> None:
    """Writes the frozen parameters of a new run, and waits until they are written; nothing where all train."""
    # What a run left that died before its first checkpoint is of no use.
    on_primary(lambda: shutil.rmtree(workdir / FOLDER, ignore_errors=True))
    if program.tuning.is_partial:
        with Checkpoints(workdir / FOLDER, _ONE) as folder:
            folder.save(0, {"params": state.frozen}, {})


def fingerprint_of(program: Program, workdir: pathlib.Path) -> dict[str, str]:
    """What each checkpoint of a run says of its frozen parameters; nothing where all train."""
    if not program.tuning.is_partial:
        return {}
    found = _fingerprint(workdir) if hosts.is_primary() else ""
    return {META: from_primary(found)}


def load_frozen(program: Program, workdir: pathlib.Path, meta: Mapping[str, Any]) -> Params:
    """The frozen parameters for the checkpoint that says `meta` of itself; an empty tree where all train.

    Raises UserError where they are gone, are damaged, or are not those that the checkpoint was trained with.
    """
    if not program.tuning.is_partial:
        return {}
    if problem := _describe_lost(workdir, meta):
        raise UserError(problem)
    frozen = program.abstract_state().frozen
    with Checkpoints(workdir / FOLDER, _ONE, read_only=True) as folder:
        params, _ = folder.restore_params(frozen, 0)
    return params


def describe_lost(program: Program, workdir: pathlib.Path) -> str:
    """A sentence where the newest checkpoint has lost its frozen parameters; "" where all is well."""
    if not program.tuning.is_partial:
        return ""
    with Checkpoints(workdir / "checkpoints", read_only=True, tell=lambda text: None) as checkpoints:
        return _describe_lost(workdir, checkpoints.read_meta())


def _describe_lost(workdir: pathlib.Path, meta: Mapping[str, Any]) -> str:
    """A sentence where the frozen parameters are gone or are not those of the checkpoint with `meta`, or ""."""
    found = _fingerprint(workdir)
    if found and found == meta.get(META):
        return ""
    return (
        f"{workdir / FOLDER} does not hold the frozen parameters that the checkpoint of update {meta['update']} "
        "was trained with; restore that folder, or begin again with another --workdir"
    )


def _fingerprint(workdir: pathlib.Path) -> str:
    """The digest of the digests of all files; "" where there are none."""
    file = workdir / FOLDER / "0" / shelf.STATE / digests.NAME
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
