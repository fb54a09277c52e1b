"""The modes there are: one line each. The file of the same name beside this one has `run(request) -> exit code`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mode:
    """What is to be known of a mode before its file is imported.

    needs         what must be there: "nothing", a "run" in the workdir, or "parameters", of a run in the workdir or of
                  the one that checkpoint.init_from names
    flags         the flags that this mode heeds and not all modes do
    for_topology  whether it compiles for plan.topology where that names one; it then looks at no workdir
    """

    needs: str
    flags: tuple[str, ...] = ()
    for_topology: bool = False


MODES = {
    "train": Mode(needs="nothing"),
    "evaluate": Mode(needs="parameters", flags=("checkpoint",)),
    "generate": Mode(needs="run", flags=("checkpoint", "prompt", "prompt_file")),
    "plan": Mode(needs="nothing", for_topology=True),
}
