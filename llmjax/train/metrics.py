"""The run's record: `metrics.jsonl`, TensorBoard events, and what the terminal shows.

One JSON object a line. `{"kind": "train", "update": n, ...}` once per update, with

    tokens                positions consumed since the run began, padding included (sequences x seq_len)
    seconds               wall time since the run began, added up over resumed parts
    loss                  mean per target token, exact over the update's micro-steps
    learning_rate, grad_norm, accumulation_steps
    packing_efficiency    summed target weights / positions
    data_wait             seconds of this update spent waiting for the next batch
    tokens_per_second     absent for the first update after a start (it compiles)
    mfu                   model FLOPs per second / peak; absent where the device's peak is unknown

and `{"kind": "evaluate", "update", "tokens", "seconds", "loss", "perplexity", "bits_per_byte"}` on held-out
text. Numbers that JSON cannot hold are written "nan", "inf", "-inf".

A resumed run continues the file where its checkpoint stood: later lines, and a torn last one, are cut first.
So the file has neither gaps nor duplicates, and, apart from `TIMING` fields, equals that of a run that never
stopped.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from tensorboardX import SummaryWriter

from llmjax.parallel import hosts
from llmjax.train.progress import Progress

TIMING = ("seconds", "tokens_per_second", "data_wait", "mfu")
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Recorder:
    """Writes metrics into `workdir`, from the first process only; a context manager, which closes the files.

    resume_update   the update from which the run goes on; what was recorded after it is dropped
    num_updates     at which the run ends, for the progress display
    """

    def __init__(self, workdir: str | Path, *, resume_update: int, num_updates: int):
        self._primary = hosts.is_primary()
        if not self._primary:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        truncate(path, resume_update)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=resume_update + 1,
            flush_secs=10,
            filename_suffix=f".{resume_update}.{os.getpid()}",  # its time is in seconds: names could collide
        )
        self._progress = Progress(num_updates, resume_update)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(self, update: int, values: dict[str, float]) -> None:
        """Records one update."""
        if self._primary:
            self._write("train", update, values)
            self._progress.train(update, values)

    def evaluate(self, update: int, values: dict[str, float]) -> None:
        """Records one evaluation on held-out text."""
        if self._primary:
            self._write("evaluate", update, values)
            self._progress.evaluate(update, values)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._primary:
            self._progress.say(text)

    def flush(self) -> None:
        """Puts everything recorded so far on disk, as a checkpoint that follows it relies on."""
        if self._primary:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Ends the progress display and closes the files."""
        if self._primary:
            self._progress.close()
            self._file.close()
            self._board.close()

    def _write(self, kind: str, update: int, values: dict[str, float]) -> None:
        line = {"kind": kind, "update": update}
        line |= {name: value if math.isfinite(value) else str(float(value)) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX complains of others on the terminal
                self._board.add_scalar(f"{kind}/{name}", value, update)


def read_metrics(workdir: str | Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`, with non-finite numbers as floats, without a torn last line."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = (_parse(line) for line in path.read_bytes().splitlines())
    return [
        {name: NOT_FINITE.get(value, value) for name, value in line.items()}
        for line in lines
        if line is not None
    ]


def truncate(path: Path, update: int) -> None:
    """Drops from a metrics file, in one step, all lines after `update` and any that is not whole."""
    if not path.exists():
        return
    old = path.read_bytes()
    parsed = ((line, _parse(line)) for line in old.splitlines())
    new = b"".join(
        line + b"\n" for line, values in parsed if values is not None and values["update"] <= update
    )
    if new == old:
        return
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("wb") as file:
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _parse(line: bytes) -> dict | None:
    """The object of a whole line; None for a torn one, which lacks its end."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and "update" in values else None
