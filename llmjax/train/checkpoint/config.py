"""The section `checkpoint` of the config."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.errors import UserError
from llmjax.ranges import COUNT, Range, Unset, check_ranges
from llmjax.train.checkpoint.which import check_name


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The section `checkpoint` of the config: when to save, what to keep, and which parameters a new run begins with.

    every            updates between checkpoints; 0 = only at the end
    keep             how many of the newest checkpoints are kept
    keep_best        whether the best one is kept too
    init_from        workdir of another run or a folder of transformers, whose parameters this run begins with;
                     "" = random ones
    init_checkpoint  the checkpoint of that run: latest, best, the number of an update, or average:N
    """

    every: Annotated[int, Range(1, COUNT, "only at the end")] = 100
    keep: Annotated[int, Range(1, COUNT)] = 2
    keep_best: bool = True
    init_from: Annotated[str, Unset("")] = ""
    init_checkpoint: Annotated[str, Unset("latest")] = "latest"

    def __post_init__(self):
        check_ranges("checkpoint", self)
        check_name("checkpoint.init_checkpoint", self.init_checkpoint)
        if self.init_checkpoint != "latest" and not self.init_from:
            raise UserError(
                f"checkpoint.init_checkpoint={self.init_checkpoint!r} has no meaning without checkpoint.init_from; "
                "name a workdir there, or leave it at latest"
            )
