"""What a sink is: a place outside of metrics.jsonl and samples.jsonl that is told what a run records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from llmjax.workdir.samples import Sample


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

    def close(self) -> None:
        """Ends, with everything told so far where it belongs."""
