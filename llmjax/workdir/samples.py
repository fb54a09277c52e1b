"""`samples.jsonl`: the texts that a training run samples from itself, one JSON object a line.

    {"update": 100, "prompt": "import ", "text": "os\\n..."}

`text` is what the model wrote after `prompt`. The lines stand in the order of the updates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from llmjax.files import write_atomically
from llmjax.workdir.metrics import LARGEST

FILE = "samples.jsonl"
# Where versions before 0.2 wrote the samples, as Markdown. It is neither read nor written any more.
OLD_FILE = "samples.md"


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the model wrote after `prompt`, with the parameters of `update`."""

    update: int
    prompt: str
    text: str


def write_samples(workdir: Path, samples: Sequence[Sample]) -> None:
    """Adds `samples`, which are all of one update, to the samples file of `workdir`.

    Samples of the same update and of later ones are dropped first: a run that resumes from an older checkpoint makes
    them again. A line that cannot be read stays as it is.
    """
    path = workdir / FILE
    first = min((sample.update for sample in samples), default=LARGEST)
    old = path.read_bytes().splitlines() if path.exists() else []
    kept = [line for line in old if (sample := _parse(line)) is None or sample.update < first]
    new = [json.dumps(dataclasses.asdict(sample), ensure_ascii=False) for sample in samples]
    # A lone surrogate has no UTF-8. It is written as \udcXX, which JSON reads back.
    lines = [*kept, *(line.encode("utf-8", "backslashreplace") for line in new)]
    write_atomically(path, b"".join(line + b"\n" for line in lines))


def read_samples(workdir: Path) -> tuple[list[Sample], int]:
    """The samples of `workdir`, the newest last, and the number of lines that cannot be read."""
    path = workdir / FILE
    lines = path.read_bytes().splitlines() if path.exists() else []
    parsed = [_parse(line) for line in lines if line.strip()]
    samples = [sample for sample in parsed if sample is not None]
    return samples, len(parsed) - len(samples)


def _parse(line: bytes) -> Sample | None:
    """The sample on one line, or None where the line is damaged. Keys that are not known do no harm."""
    try:
        record = json.loads(line)
        update, prompt, text = record["update"], record["prompt"], record["text"]
    # RecursionError: JSON of very many brackets.
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_count = isinstance(update, int) and not isinstance(update, bool) and 0 <= update <= LARGEST
    return (
        Sample(update, prompt, text)
        if is_count and isinstance(prompt, str) and isinstance(text, str)
        else None
    )
