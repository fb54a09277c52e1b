"""Reads metrics.jsonl, whatever state a run left it in.

A run may be killed at any moment, so the reader is forgiving. It drops a torn last line, counts other lines that it
cannot read, and of two lines for the same update takes the later one. It ignores unknown kinds and keys.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np

# The largest update: up to 2^53, a float64 holds every whole number.
LARGEST = 2**53
# Numbers that JSON cannot hold are written as text.
SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The lines of a run by kind, in the order of updates; all numbers are floats.

    train, evaluate  numbers, and the text `reason`
    statistics       numbers, lists of numbers (one for each layer), and dicts of numbers
    events           the texts `event` and `text`, and the number `update`; an update may have several
    unreadable       how many lines could not be read
    """

    train: list[dict]
    evaluate: list[dict]
    statistics: list[dict] = dataclasses.field(default_factory=list)
    events: list[dict] = dataclasses.field(default_factory=list)
    unreadable: int = 0


def read_metrics(path: pathlib.Path) -> Metrics:
    """Reads a metrics file. A file that does not exist has no lines."""
    kinds: dict[str, dict[int, dict]] = {"train": {}, "evaluate": {}, "statistics": {}}
    events: dict[tuple, dict] = {}
    unreadable, pending = 0, 0
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                if not line.strip():
                    continue
                # A line that cannot be read counts only when another follows: the last one is merely torn.
                unreadable += pending
                record = read_line(line)
                pending = int(record is None)
                if record is None:
                    continue
                kind, update = str(record.get("kind")), int(record["update"])
                if kind == "event":
                    events[update, record.get("event"), record.get("text")] = record
                elif kind in kinds:
                    kinds[kind][update] = record if kind == "statistics" else _plain(record)
    ordered = {kind: [lines[update] for update in sorted(lines)] for kind, lines in kinds.items()}
    return Metrics(
        **ordered, events=sorted(events.values(), key=lambda event: event["update"]), unreadable=unreadable
    )


def read_line(line: str | bytes) -> dict | None:
    """One line as a dict whose numbers are floats, or None where the line is torn or has no valid `update`."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            return None
        record = {key: _floats(value) for key, value in record.items()}
    # No JSON, bytes that are no text, a number of too many digits; and brackets nested too deeply.
    except (ValueError, RecursionError):
        return None
    update, texts = record.get("update"), (record.get(key, "") for key in ("kind", "event", "text"))
    whole = isinstance(update, float) and update.is_integer() and 0 <= update <= LARGEST
    return record if whole and all(isinstance(text, str) for text in texts) else None


def _floats(value: object) -> object:
    """`value` with every number as a float, spelled ones too. Text stays, and anything else becomes None."""
    if isinstance(value, list):
        return [_floats(each) for each in value]
    if isinstance(value, dict):
        return {key: _floats(each) for key, each in value.items()}
    as_number = number(value)
    return value if isinstance(value, str) and as_number is None else as_number


def _plain(record: dict) -> dict:
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, float) or (key == "reason" and isinstance(value, str))
    }


def number(value: object) -> float | None:
    """`value` as a float, where it is a number or the text nan, inf or -inf; otherwise None."""
    if isinstance(value, str):
        return SPELLED.get(value.lower())
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def column(records: list[dict], key: str) -> np.ndarray:
    """float64 [records]: the values under a key, NaN where a record has no number there."""
    values = (record.get(key) for record in records)
    return np.array([value if isinstance(value, float) else math.nan for value in values], dtype=float)


def layer_columns(records: list[dict], key: str) -> np.ndarray:
    """float64 [records, layers]: the lists under a key, NaN where a list is missing or has no number."""
    rows = [value if isinstance(value := record.get(key), list) else [] for record in records]
    values = np.full((len(rows), max(map(len, rows), default=0)), math.nan)
    for i, row in enumerate(rows):
        values[i, : len(row)] = [each if isinstance(each, float) else math.nan for each in row]
    return values
