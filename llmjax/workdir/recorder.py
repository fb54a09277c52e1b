"""The run's record: `metrics.jsonl`, the sinks such as TensorBoard, and what the terminal shows.

One JSON object a line. `{"kind": "train", "update": n, ...}` once per update, with

    tokens                positions trained on since the run began, padding included (sequences x seq_len)
    seconds               wall time since the run began, summed over its resumed parts
    loss                  mean per target token, exact over the update's micro-steps
    learning_rate, grad_norm, accumulation_steps
    seq_len               of the rows trained on
    packing_efficiency    summed target weights / positions, where all tokens of documents have weight 1
    data_wait             seconds of this update spent waiting for the next batch
    tokens_per_second     absent where the step was compiled: at a start, and where seq_len changes; and where a profile
                          begins or ends
    mfu                   model FLOPs per second / peak; absent where the device's peak is unknown
    noise_scale           of the gradient, in target tokens; absent before it was measured
    reason                why a controller chose this accumulation_steps; absent without one
    dropped               how many micro-steps were left out because they were not finite; absent where none was
    skipped               1 where the parameters did not move; absent otherwise

and `{"kind": "evaluate", "update", "tokens", "seconds", ...}` with the scores of the task on held-out text,
`{"kind": "statistics", "update", "tokens", "seconds", ...}` of the layers (see `statistics.py`), and
`{"kind": "event", "update", "event", "text"}` for what a person should know. Numbers that JSON cannot hold are
written as the texts "nan", "inf" and "-inf".

A resumed run first cuts the file back to its checkpoint: it removes later lines and a torn last line, and moves other
lines that cannot be read to metrics.unreadable.jsonl. The file then has neither gaps nor duplicates. Except for the
fields in `TIMING`, it equals the file of a run that never stopped.
"""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llmjax.files import write_atomically
from llmjax.parallel import hosts
from llmjax.scores.score import Score
from llmjax.terminal.progress import Progress
from llmjax.workdir.metrics import read_line
from llmjax.workdir.samples import Sample
from llmjax.workdir.sinks.contract import NOWHERE, MetricsConfig, Opening, Sink
from llmjax.workdir.sinks.table import SINKS

# Beside metrics.jsonl.
UNREADABLE = "metrics.unreadable.jsonl"
# The fields that depend on the clock, and so differ between two runs with the same numbers.
TIMING = ("seconds", "tokens_per_second", "data_wait", "mfu")


class Recorder:
    """Writes the metrics of a run and shows its progress. A context manager, which closes the files.

    Only the first process writes; in the others every method does nothing.

    resume_update      the update from which the run goes on; lines after it are dropped
    num_tokens         the tokens of the whole run, for the progress display
    tokens_per_update  the tokens of an update of the usual size, for the progress display
    scores             the scores of an evaluation that are shown
    on_closed          called when whoever read standard output has closed it
    metrics            which sinks there are, see `sinks/table.py`
    config             the whole config, for the sinks

    Raises UserError where a sink cannot be had.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        resume_update: int,
        num_tokens: int,
        tokens_per_update: int,
        scores: Sequence[Score] = (),
        on_closed: Callable[[], None] = lambda: None,
        metrics: MetricsConfig = NOWHERE,
        config: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        self._primary = hosts.is_primary()
        if not self._primary:
            return
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        unreadable = truncate(self._workdir / "metrics.jsonl", resume_update)
        self._file = self._open()
        self._progress = Progress(num_tokens, tokens_per_update, on_closed, scores)
        opening = Opening(self._workdir, resume_update, metrics, config, self._progress.say)
        self._sinks: list[Sink] = []
        try:
            for kind in SINKS.values():
                sink = kind.open(opening)
                self._sinks += [] if sink is None else [sink]
        except BaseException:
            self.close(failed=True)
            raise
        if unreadable:
            self._progress.say(
                f"metrics.jsonl: lines that cannot be read ({unreadable:,}) were moved to {UNREADABLE}; the record "
                "goes on without them"
            )

    def _open(self) -> TextIO:
        return (self._workdir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def train(self, update: int, values: dict[str, float | str]) -> None:
        """Records one update."""
        if self._primary:
            self._write("train", update, values)
            self._progress.train(update, values)

    def evaluate(self, update: int, values: dict[str, float]) -> None:
        """Records one evaluation on held-out text."""
        if self._primary:
            self._write("evaluate", update, values)
            self._progress.evaluate(update, values)

    def statistics(self, update: int, values: dict[str, Any]) -> None:
        """Records the statistics of the layers: numbers, lists of numbers, and dicts of both."""
        if self._primary:
            self._write("statistics", update, values)

    def samples(self, update: int, samples: Sequence[Sample]) -> None:
        """Shows the texts that the run sampled after `update` in the sinks. They are in samples.jsonl already."""
        if self._primary:
            for sink in self._sinks:
                sink.samples(update, samples)

    def event(self, update: int, event: str, text: str) -> None:
        """Records and shows what a person should know."""
        if self._primary:
            self._write("event", update, {"event": event, "text": text})
            self._progress.say(f"update {update}  {event}: {text}")

    def rewind(self, update: int) -> None:
        """Removes the lines after `update`, to which the run has gone back."""
        if self._primary:
            self._file.close()
            truncate(self._workdir / "metrics.jsonl", update, keep_rewinds=True)
            self._file = self._open()
            for sink in self._sinks:
                sink.rewind(update)

    def forget(self, update: int) -> None:
        """Removes the evaluation and the statistics of `update`, the last one, because they are made again."""
        if self._primary:
            self._file.close()
            truncate(self._workdir / "metrics.jsonl", update, keep_rewinds=True, of_update=("train", "event"))
            self._file = self._open()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._primary:
            self._progress.say(text)

    def flush(self) -> None:
        """Puts everything recorded so far on disk.

        It is called before a checkpoint is saved: a run that resumes there must find every line up to it.
        """
        if self._primary:
            self._file.flush()
            os.fsync(self._file.fileno())
            for sink in self._sinks:
                sink.flush()

    def summarize(self, results: Mapping[str, float]) -> None:
        """Tells the sinks what the run has come to, once training has ended."""
        if self._primary:
            for sink in self._sinks:
                sink.summarize(results)

    def close(self, failed: bool = False) -> None:
        """Ends the progress display and closes the files. `failed` says whether training failed."""
        if self._primary:
            self._progress.close()
            self._file.close()
            for sink in self._sinks:
                sink.close(failed)

    def _write(self, kind: str, update: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "update": update} | _plain(values)) + "\n")
        # The sinks draw curves, and have no place for lists and for numbers that are not finite.
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for sink in self._sinks:
            sink.numbers(kind, update, numbers)


def _plain(value: Any) -> Any:
    """`value` with numbers that are not finite as text, so that JSON can hold it."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str) or math.isfinite(value):
        return value
    return str(float(value))


def truncate(
    path: Path, update: int, keep_rewinds: bool = False, of_update: Sequence[str] | None = None
) -> int:
    """Removes from a metrics file, in one step, all lines after `update` and a torn last line.

    Other lines that cannot be read are moved to the end of `UNREADABLE`; returns how many.

    keep_rewinds  whether to keep the event of a rewind to `update`, which carries that number but happened later
    of_update     the kinds whose lines of `update` itself are kept; None: all kinds
    """
    if not path.exists():
        return 0
    old = path.read_bytes()
    parsed = [(line, read_line(line)) for line in old.splitlines()]
    last_is_torn = bool(parsed) and parsed[-1][1] is None and not old.endswith(b"\n")
    unreadable = [line for line, values in parsed if values is None and line.strip()]
    unreadable = unreadable[:-1] if last_is_torn else unreadable
    if unreadable:
        aside = path.with_name(UNREADABLE)
        before = aside.read_bytes() if aside.exists() else b""
        write_atomically(aside, before + b"".join(line + b"\n" for line in unreadable))

    def stays(values: dict) -> bool:
        if of_update is not None and values["update"] == update and values.get("kind") not in of_update:
            return False
        rewound_here = values.get("event") == "rewind" and values["update"] == update
        return values["update"] <= update and (keep_rewinds or not rewound_here)

    new = b"".join(line + b"\n" for line, values in parsed if values is not None and stays(values))
    if new != old:
        write_atomically(path, new)
    return len(unreadable)
