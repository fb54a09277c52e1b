"""The table of all modes, with a line for each.

The file of the same name in this folder has the function `run(request)`, which does the work and returns the exit code.
This file imports nothing, so that the command line knows all modes before jax is imported.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mode:
    """What must be known about a mode before its file is imported.

    needs         what the mode needs: "nothing", a "run" in the workdir, or "parameters", which may be those of a run
                  in the workdir or of the run that checkpoint.init_from names
    flags         the flags of the command line that this mode uses and other modes may not
    keeps_empty   whether empty lines of --prompt_file are prompts, so that every line has its answer
    for_topology  whether the mode compiles for the devices that plan.topology names, if it names any. It then looks at
                  no workdir
    """

    needs: str
    flags: tuple[str, ...] = ()
    for_topology: bool = False
    keeps_empty: bool = False


MODES = {
    "train": Mode(needs="nothing", flags=("profile",)),
    "evaluate": Mode(needs="parameters", flags=("checkpoint", "questions", "against")),
    "generate": Mode(needs="parameters", flags=("checkpoint", "prompt", "prompt_file", "interactive")),
    "chat": Mode(needs="parameters", flags=("checkpoint",)),
    "translate": Mode(
        needs="run",
        flags=("checkpoint", "prompt", "prompt_file", "interactive", "references"),
        keeps_empty=True,
    ),
    "classify": Mode(needs="run", flags=("checkpoint", "prompt", "prompt_file", "jsonl")),
    "embed": Mode(
        needs="parameters", flags=("checkpoint", "prompt", "prompt_file", "jsonl", "neighbours", "table")
    ),
    "serve": Mode(needs="parameters", flags=("checkpoint",)),
    "plan": Mode(needs="nothing", for_topology=True),
}
