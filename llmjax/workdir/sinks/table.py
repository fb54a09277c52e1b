"""The sinks there are: one line each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmjax.workdir.sinks.contract import Sink
from llmjax.workdir.sinks.tensorboard import TensorBoard

# Name -> (workdir, the update after which the run goes on) -> the sink.
SINKS: dict[str, Callable[[Path, int], Sink]] = {
    "tensorboard": TensorBoard,
}
