"""The files of a folder of checkpoints: how they are named, read, checked, and set aside when damaged.

A checkpoint is a folder named by the number of its update. It holds `state/` (the arrays and their digests) and
`meta/metadata` (JSON). A damaged checkpoint is renamed to `damaged-N` and never deleted; orbax ignores such names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from llmjax.errors import UserError
from llmjax.train.checkpoint import digests
from llmjax.train.checkpoint.digests import Damaged

META = "meta/metadata"
STATE = "state"
# In STATE. orbax writes it when it has put together the parts that the processes wrote.
MERGED = "manifest.ocdbt"
# The key in the meta of a digest of everything else in it.
DIGEST = "digest"
# Raises ValueError where a run cannot resume from a meta.
CheckMeta = Callable[[dict], None]


def numbers(folder: Path) -> list[int]:
    """The updates that entries of `folder` are named after, ascending; empty where there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def set_aside(folder: Path) -> list[str]:
    """The names of the damaged checkpoints that were set aside in `folder`."""
    return sorted(path.name for path in folder.glob("damaged-*"))


def read_meta(path: Path) -> dict:
    """The meta of the checkpoint in `path`, without its digest. Raises Damaged where it does not match the digest."""
    meta, _ = _read_meta(path)
    return meta


def with_digest(meta: dict) -> dict:
    """`meta` with its digest, as it is written."""
    plain = json.loads(json.dumps(meta))
    return {**plain, DIGEST: digests.of_json(plain)}


def has_digests(path: Path) -> bool:
    """Whether the checkpoint in `path` has digests. Older versions wrote none."""
    return _read_meta(path)[1] or (path / STATE / digests.NAME).exists()


def check(path: Path, check_meta: CheckMeta, *, contents: bool = True, part: int = 0, parts: int = 1) -> None:
    """Raises Damaged, which says why, where the checkpoint in `path` is not whole.

    `contents`, `part` and `parts` are as in `digests.check`.
    """
    if not path.is_dir():
        raise Damaged("it is a file and no folder")
    meta, has_digest = _read_meta(path)
    for key in ("rank", "held_out_loss"):  # the second is the name of older versions
        rank = meta.get(key)
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float)):
            raise Damaged(f"{META} has {key}={rank!r}")
    try:
        check_meta(meta)
    except ValueError as error:
        raise Damaged(f"{META}: {error}") from None
    if not (path / STATE).is_dir():
        raise Damaged(f"it has no folder {STATE}")
    if not (path / STATE / MERGED).exists():
        raise Damaged(f"{STATE}/{MERGED} does not exist: what the processes wrote was never put together")
    if has_digest or (path / STATE / digests.NAME).exists():
        if not has_digest:
            raise Damaged(f"{META} has lost its {DIGEST}")
        digests.check(path / STATE, contents=contents, part=part, parts=parts)
    else:
        _check_old(path / STATE)


def _check_old(state: Path) -> None:
    """Raises Damaged where the arrays of a checkpoint without digests are visibly damaged."""
    for file in sorted(state.rglob("*")):
        if file.is_file() and not file.stat().st_size:
            raise Damaged(f"{file.relative_to(state.parent).as_posix()} is empty")
    try:
        json.loads((state / "_METADATA").read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"{STATE}/_METADATA: {error.strerror}") from None
    except ValueError:
        raise Damaged(f"{STATE}/_METADATA is not JSON") from None


def move_aside(folder: Path, update: int) -> str:
    """Renames the damaged checkpoint of `update`, so that nothing takes it for a good one; returns the new name."""
    name, number = f"damaged-{update}", 1
    while (folder / name).exists():
        number += 1
        name = f"damaged-{update}-{number}"
    try:
        (folder / str(update)).rename(folder / name)
    except OSError as error:
        raise UserError(
            f"the checkpoint {folder / str(update)} is damaged and cannot be renamed to {name} ({error.strerror}); "
            "move it away"
        ) from None
    return name


def _read_meta(path: Path) -> tuple[dict, bool]:
    """The meta of the checkpoint in `path`, and whether it has a digest. Raises Damaged where the digest is wrong."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(f"{META}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{META} is not JSON") from None
    if not isinstance(meta, dict):
        raise Damaged(f"{META} holds no keys but a {type(meta).__name__}")
    if DIGEST not in meta:
        return meta, False
    digest = meta.pop(DIGEST)
    if digest != digests.of_json(meta):
        raise Damaged(f"{META} has other contents than were written")
    return meta, True
