"""What a sink is: a place outside of metrics.jsonl and samples.jsonl that is told what a run records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from llmjax.errors import UserError, choose
from llmjax.ranges import Unset
from llmjax.workdir.samples import Sample

# metrics.wandb -> the mode of W&B.
WANDB_MODES = {"": None, "online": "online", "offline": "offline"}
# The characters that the name of a W&B project must not have.
NOT_IN_PROJECT = "/\\#?%:"


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """The `metrics` section of the config: where a run shows its metrics, besides its workdir.

    wandb          "" for nowhere, "online" for Weights & Biases, "offline" to write its files without a network
    wandb_project  the project there
    """

    wandb: Annotated[str, Unset("")]
    wandb_project: Annotated[str, Unset("llmjax")]

    def __post_init__(self) -> None:
        choose(
            {name or "''": mode for name, mode in WANDB_MODES.items()}, "metrics.wandb", self.wandb or "''"
        )
        project = self.wandb_project
        if not 0 < len(project) <= 128 or set(project) & set(NOT_IN_PROJECT):
            raise UserError(
                f"metrics.wandb_project={project!r} is no name of a W&B project; give 1 to 128 characters, and none of "
                f"{' '.join(NOT_IN_PROJECT)}"
            )


# For a record that is made without a config.
NOWHERE = MetricsConfig(wandb="", wandb_project="llmjax")


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a sink is made from.

    workdir  of the run
    update   the one after which the run goes on
    metrics  the section of the config
    config   the whole config, as JSON would give it
    say      prints a line, and may be called at any time
    """

    workdir: Path
    update: int
    metrics: MetricsConfig
    config: Mapping[str, Any]
    say: Callable[[str], None]


class Sink(Protocol):
    """A place that shows the record of a run. It lies in a file beside this one and has a line in `table.SINKS`.

    It is told things in the order in which they happen. A run that resumes makes a new sink, which is told of the
    updates after the checkpoint again.
    """

    def numbers(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one line of metrics.jsonl, all of them finite. `kind` is that of the line."""

    def samples(self, update: int, samples: Sequence[Sample]) -> None:
        """Takes the texts that the run sampled after `update`."""

    def rewind(self, update: int) -> None:
        """Is told that the run went back to `update`: what was told of later updates no longer holds."""

    def flush(self) -> None:
        """Puts everything told so far where it belongs."""

    def summarize(self, results: Mapping[str, float]) -> None:
        """Takes what the run has come to, once training has ended."""

    def close(self, failed: bool) -> None:
        """Ends, with everything told so far where it belongs. `failed` says whether training failed."""


@dataclasses.dataclass(frozen=True)
class SinkKind:
    """A line of the table of sinks.

    open   makes the sink, or None where the config does not ask for it
    check  raises UserError where the config asks for it and it cannot be had; nothing is written
    """

    open: Callable[[Opening], Sink | None]
    check: Callable[[MetricsConfig], None] = lambda metrics: None
