"""Finds damaged checkpoints: by their files alone when a directory is opened, and by their contents before use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from llmjax.parallel.agreement import gather
from llmjax.train.checkpoint import shelf
from llmjax.train.checkpoint.digests import Damaged
from llmjax.train.checkpoint.retention import Facts, read_amended


def sort_checkpoints(
    folder: Path, check_meta: shelf.CheckMeta, *, read_only: bool
) -> tuple[list[tuple[int, dict]], list[tuple[int, str, str]]]:
    """(update, facts) of each whole checkpoint, and (update, what is wrong, new name) of each damaged one.

    File sizes and metas are looked at, and no contents are read. Unless `read_only`, damaged checkpoints are renamed;
    otherwise the new name is "". Facts are plain dictionaries, which processes can send to each other.
    """
    whole, damaged = [], []
    for update in shelf.numbers(folder):
        path = folder / str(update)
        try:
            shelf.check(path, check_meta, contents=False)
            meta = shelf.read_meta(path) | read_amended(str(folder), update)
            whole.append((update, dataclasses.asdict(Facts.of(meta))))
        except Damaged as why:
            # The run that trains here may have deleted it in the meantime.
            if not path.exists():
                continue
            name = "" if read_only else shelf.move_aside(folder, update)
            damaged.append((update, str(why), name))
    return whole, damaged


def find_damage(path: Path, check_meta: shelf.CheckMeta, tell: Callable[[str], None]) -> str:
    """What is wrong with the contents of the checkpoint in `path`; "" where nothing is.

    All processes call this, each reads a part of the files, and all get the same answer.
    """
    part, parts = jax.process_index(), jax.process_count()
    why, has_digests = "", True
    try:
        shelf.check(path, check_meta, part=part, parts=parts)
        has_digests = shelf.has_digests(path)
    except Damaged as found:
        why = str(found)
    why = next(filter(None, gather(why)), "")
    if not why and not has_digests:
        tell(
            f"the checkpoint of update {path.name} in {path.parent} has no digests (an older version wrote it), "
            "so damage in it may go unnoticed"
        )
    return why
