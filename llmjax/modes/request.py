"""What a mode is asked to do: a checked config, and what the command line says besides."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax

from llmjax.config.resolve import Derived
from llmjax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Request:
    """What a mode is asked to do.

    config, derived  resolved, see `config/resolve.py`
    workdir        where everything of a run is written and found
    devices        to run on, or of a named topology to compile for
    prompts        texts to continue
    checkpoint     latest, best or the number of an update
    started        `time.perf_counter()` when the process began
    """

    config: Config
    derived: Derived
    workdir: pathlib.Path
    devices: Sequence[jax.Device]
    prompts: tuple[str, ...]
    checkpoint: str
    started: float
