"""The state of a workdir: what was saved in it, whether it is still there, and whether all processes see the same.

`saved.json` names the last save that was finished. It lies outside the folders of checkpoints. If such a folder is
missing, perhaps because a volume is not mounted, the run is therefore not mistaken for one that has yet to begin.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.errors import UserError
from llmjax.train.checkpoint import shelf
from llmjax.train.checkpoint.digests import Damaged
from llmjax.train.loop.run_position import Position
from llmjax.workdir.contents import saved_config, write_json
from llmjax.workdir.metrics import read_metrics

SAVED = "saved.json"
# The folder of checkpoints between updates, and the one of an update that was stopped between two micro-steps.
CHECKPOINTS = "checkpoints"
PARTIAL_UPDATE = "partial_update"
# Versions before 0.2 kept a stopped update in a folder of this name. It is read and removed, never written.
OLD_PARTIAL_UPDATE = "window"
PARTIAL_FOLDERS = (PARTIAL_UPDATE, OLD_PARTIAL_UPDATE)
FOLDERS = (CHECKPOINTS, *PARTIAL_FOLDERS)


def note_saved(workdir: pathlib.Path, folder: str) -> Callable[[int | None, dict], None]:
    """A function (number, meta) -> None that writes to saved.json that checkpoint `number` in `folder` is complete.

    The number None says that all checkpoints were given up, because they gave no finite loss.
    """

    def note(number: int | None, meta: dict) -> None:
        write_json(workdir / SAVED, {"folder": folder, "number": number, "update": meta.get("update")})

    return note


def check_meta(meta: Mapping[str, Any]) -> None:
    """Raises ValueError, which says why, where the meta of a checkpoint lacks something that a run needs to resume."""
    Position.from_meta(dict(meta))
    for name, kind in (("config", dict), ("data_fingerprint", str)):
        if not isinstance(meta.get(name), kind):
            raise ValueError(
                f"{name} is missing" if name not in meta else f"{name} is a {type(meta[name]).__name__}"
            )


def has_begun(workdir: pathlib.Path) -> bool:
    """Whether `workdir` holds a checkpoint or a stopped update from which its run can resume."""
    return any(shelf.numbers(workdir / folder) for folder in FOLDERS)


def partial_folders(workdir: pathlib.Path) -> list[str]:
    """The folders in `workdir` that hold an update stopped between two micro-steps: none, one, or both names."""
    return [folder for folder in PARTIAL_FOLDERS if shelf.numbers(workdir / folder)]


def remove_partial_update(workdir: pathlib.Path) -> None:
    """Deletes the stopped update in `workdir`, once the run has finished and saved it. Damaged ones stay, for a person
    to look at."""
    for name in PARTIAL_FOLDERS:
        folder = workdir / name
        for number in shelf.numbers(folder):
            shutil.rmtree(folder / str(number), ignore_errors=True)
        if folder.is_dir() and not shelf.set_aside(folder):
            shutil.rmtree(folder, ignore_errors=True)


def check_standing(workdir: pathlib.Path, warn: Callable[[str], None]) -> None:
    """Raises UserError where a run was saved in `workdir` and no checkpoint is left.

    Where only the last save is gone, it says so through `warn`. A run that was killed before its first checkpoint may
    begin again.
    """
    last = _last_saved(workdir)
    is_unnamed = _is_unnamed(workdir, last)
    if has_begun(workdir):
        if last and not is_unnamed and not (workdir / last).exists():
            warn(
                f"{workdir / SAVED} says that {last} was saved last, but it is not there any more; going on from the "
                "newest that is"
            )
        return
    if is_unnamed:
        return
    if reason := _why_saved(workdir, last):
        raise UserError(
            f"--workdir={workdir} holds no checkpoint, although {reason}; mount or restore {workdir / 'checkpoints'}, "
            "or use another --workdir to begin again"
        )


def forget_unnamed_save(workdir: pathlib.Path) -> None:
    """Lets saved.json name a checkpoint that is there, where the run died before the noted one got its name.

    To be called before training opens the checkpoints, which removes what has no name.
    """
    if not _is_unnamed(workdir, _last_saved(workdir)):
        return
    there = [(folder, shelf.numbers(workdir / folder)) for folder in FOLDERS]
    folder, numbers = next(((folder, numbers) for folder, numbers in there if numbers), (CHECKPOINTS, [None]))
    note_saved(workdir, folder)(numbers[-1], {})


def check_metrics(workdir: pathlib.Path, update: int, warn: Callable[[str], None]) -> None:
    """Warns where metrics.jsonl lacks lines up to `update`, after which the run goes on."""
    path = workdir / "metrics.jsonl"
    if not update:
        return
    lines = read_metrics(path).train
    last = int(lines[-1]["update"]) if lines else 0
    if last < update:
        state = f"ends at update {last}" if path.exists() else "is gone"
        warn(f"{path} {state}, but the run goes on after update {update}; its curves will have a gap")


def config_of(workdir: pathlib.Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The resolved config of the run in `workdir`, or None where there is no run.

    Where config.json is gone, the config is read from a checkpoint.
    """
    saved = saved_config(workdir)
    if saved is not None:
        return saved
    for folder in FOLDERS:
        for number in reversed(shelf.numbers(workdir / folder)):
            try:
                config = shelf.read_meta(workdir / folder / str(number)).get("config")
            except Damaged:
                continue
            if isinstance(config, dict):
                warn(f"{workdir / 'config.json'} is gone; the config in {folder}/{number} is used")
                return config
    if has_begun(workdir):
        raise UserError(
            f"--workdir={workdir} holds checkpoints but no config.json that says of what; restore it, or use another "
            "--workdir"
        )
    return None


def describe(workdir: pathlib.Path, *, folders: bool) -> dict[str, str]:
    """Name -> what this process sees in `workdir`, for a comparison between processes.

    folders  whether checkpoints are compared too
    """
    seen = {}
    for name in ("config.json", "tokenizer/tokenizer.json"):
        path = workdir / name
        seen[f"{name} of --workdir"] = (
            f"one of digest {_digest(path.read_bytes())}" if path.is_file() else "none"
        )
    for folder in FOLDERS if folders else ():
        updates = shelf.numbers(workdir / folder)
        seen[f"{folder} of --workdir"] = ", ".join(map(str, updates)) or "nothing"
    return seen


def digest_of(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of a hash, by which processes see whether their configs are the same."""
    return _digest(json.dumps(config, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _last_saved(workdir: pathlib.Path) -> str:
    """The last finished save, such as checkpoints/60; "" where none was noted or all were given up."""
    path = workdir / SAVED
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return "" if saved["number"] is None else f"{saved['folder']}/{int(saved['number'])}"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return "something"


def _is_unnamed(workdir: pathlib.Path, last: str) -> bool:
    """Whether the run died after it noted the save `last` and before the folder of that save got its name."""
    return bool(last) and any(workdir.glob(f"{last}.orbax-checkpoint-tmp*"))


def _why_saved(workdir: pathlib.Path, last: str) -> str:
    """What shows that something was saved in `workdir`; "" where its run may have been killed before its first save."""
    if last:
        return f"{SAVED} says that {last} was saved"
    for folder in FOLDERS:
        if aside := shelf.set_aside(workdir / folder):
            return f"{folder}/{aside[-1]} shows that there was one"
    if (workdir / SAVED).exists():
        return ""
    # Older versions wrote no saved.json. Their second save waited until the first was finished.
    if (workdir / "summary.json").exists():
        return "summary.json shows that its run was saved at the end"
    config, lines = saved_config(workdir), read_metrics(workdir / "metrics.jsonl").train
    if not config or not lines or any("skipped" in line for line in lines):
        return ""
    try:
        between = config["checkpoint"]["every"] * config["train"]["tokens_per_update"]
    except KeyError:
        return ""
    if between and lines[-1].get("tokens", 0) > 2 * between:
        return f"metrics.jsonl goes on after the second, to update {int(lines[-1]['update'])}"
    return ""
