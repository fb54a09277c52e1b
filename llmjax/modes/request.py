"""What a mode is asked to do: a checked config, and the other settings of the command line."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax

from llmjax.config.resolve import Derived
from llmjax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Request:
    """What a mode is asked to do. `dispatch.make_request` has checked all of it.

    config         the config, with all values resolved
    derived        what follows from the config, see `config/resolve.py`
    workdir        the folder to which a run writes everything and from which it reads
    devices        the devices to run on, or those of a named topology to compile for
    prompts        the texts to continue, to classify or to give vectors
    checkpoint     `latest`, `best` or the number of an update
    started        `time.perf_counter()` when the process began
    interactive    whether the texts to continue are lines of standard input, one after the other
    references     the file with the right translations, if there is one
    profile        the updates to trace, an empty range for none
    jsonl          whether the results are lines of JSON
    neighbours     the words or texts whose nearest neighbours are to be shown
    table          the file for the vectors of all tokens, if there is to be one
    questions      files of questions that are answered by likelihood
    against        the answers of another run, to compare with
    """

    config: Config
    derived: Derived
    workdir: pathlib.Path
    devices: Sequence[jax.Device]
    prompts: tuple[str, ...]
    checkpoint: str
    started: float
    interactive: bool = False
    references: pathlib.Path | None = None
    profile: range = range(0)
    jsonl: bool = False
    neighbours: tuple[str, ...] = ()
    table: pathlib.Path | None = None
    questions: tuple[pathlib.Path, ...] = ()
    against: pathlib.Path | None = None
