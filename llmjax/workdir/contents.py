"""The files of a workdir that people and later commands read: config.json and summary.json, and the commands that
go on from a run."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

from llmjax.errors import UserError
from llmjax.files import write_atomically
from llmjax.names import check_local, is_unicode, quote


def check_place(workdir: pathlib.Path) -> None:
    """Raises UserError where `workdir` is not, and cannot become, a folder that checkpoints can be written to."""
    check_name(f"--workdir={workdir}", workdir, "give another path")
    there = next(path for path in (workdir, *workdir.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        kind = "a link to nothing" if there.is_symlink() else "a file"
        where = "" if there == workdir else f" is below {there}, which"
        raise UserError(f"--workdir={workdir}{where} is {kind}; give a directory, or one to be made")


def check_name(asked: str, workdir: pathlib.Path, remedy: str) -> None:
    """Raises UserError where orbax cannot read or write checkpoints below `workdir`. The error begins with `asked`."""
    check_local(workdir, asked)
    if not is_unicode(workdir.absolute()):
        raise UserError(f"{asked} is not UTF-8, as checkpoints need; {remedy}")
    if "**" in str(workdir.absolute()):
        raise UserError(f"{asked} has ** in its path, which checkpoints cannot have; {remedy}")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as readable JSON, in one step."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def saved_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The resolved config of the run in `workdir`, or None where there is none."""
    path = workdir / "config.json"
    if not os.path.lexists(path):
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or use another --workdir") from None
    if not isinstance(saved, dict):
        raise UserError(
            f"{path} holds no config but a {type(saved).__name__}; restore it or use another --workdir"
        )
    return saved


def commands(
    workdir: pathlib.Path, num_updates: int, prompt: str, mode: str = "generate", patience: int = 0
) -> dict[str, str]:
    """Label -> a shell command that uses the run in `workdir`.

    num_updates  of the run; "train on" asks for twice as many
    prompt       of the command that uses the model
    mode         the mode that uses it; "" for none
    patience     train.patience of a run that it has ended, whose best parameters are not its last ones; otherwise 0
    """
    python = pathlib.Path(sys.executable)
    here = pathlib.Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else python
    run = f"{quote(python)} -m llmjax.main --workdir={quote(workdir)}"
    # A conversation is typed.
    given = "" if mode == "chat" else f" --prompt={quote(prompt)}"
    further = f"patience={2 * patience}" if patience else f"num_updates={2 * num_updates or 100}"
    which = " --checkpoint=best" if patience else ""
    return {
        "resume": run,
        "train on": f"{run} --config.train.{further}",
        "evaluate": f"{run} --mode=evaluate{which}",
        **({mode: f"{run} --mode={mode}{which}{given}"} if mode else {}),
        "report": f"{quote(python)} -m webbrowser {quote(workdir / 'report.html')}",
    }
