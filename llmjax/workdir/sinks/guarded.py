"""A sink that may fail without harm: what a run needs lies in its workdir, so no service ends its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmjax.errors import reason_of
from llmjax.workdir.samples import Sample
from llmjax.workdir.sinks.contract import Sink


class Guarded:
    """Passes everything on to `sink` until that fails, which it says once; from then on it passes on nothing.

    name  of the sink, for that sentence
    """

    def __init__(self, sink: Sink, name: str, say: Callable[[str], None]):
        self._sink: Sink | None = sink
        self._name, self._say = name, say

    def numbers(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        self._try(lambda sink: sink.numbers(kind, update, values))

    def samples(self, update: int, samples: Sequence[Sample]) -> None:
        self._try(lambda sink: sink.samples(update, samples))

    def rewind(self, update: int) -> None:
        self._try(lambda sink: sink.rewind(update))

    def flush(self) -> None:
        self._try(lambda sink: sink.flush())

    def summarize(self, results: Mapping[str, float]) -> None:
        self._try(lambda sink: sink.summarize(results))

    def close(self, failed: bool) -> None:
        self._try(lambda sink: sink.close(failed))

    def _try(self, act: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            act(self._sink)
        except Exception as error:
            self._sink = None
            self._say(f"{self._name} failed and is told nothing more ({reason_of(error)}); the run goes on")
