"""Reads metrics.jsonl, whatever state a run left it in.

A metrics file is written by a run that may be killed at any moment, so reading is forgiving: a torn last line
is dropped, other unreadable lines are counted, and an update that was written twice counts once (the later
line). Kinds and fields that are not known do no harm.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np

LARGEST = 2**53  # update: up to here floats hold every whole number
SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # numbers that JSON cannot hold


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The lines of a run by kind, in the order of updates; all numbers are floats.

    train, evaluate  hold numbers alone, but for the text `reason`
    statistics       also lists of numbers, one for a layer, and dicts of numbers
    events           also the texts `event` and `text`; several to an update
    """

    train: list[dict]
    evaluate: list[dict]
    statistics: list[dict] = dataclasses.field(default_factory=list)
    events: list[dict] = dataclasses.field(default_factory=list)
    unreadable: int = 0


def read_metrics(path: pathlib.Path) -> Metrics:
    """Reads metrics.jsonl; a file that does not exist has no lines."""
    kinds: dict[str, dict[int, dict]] = {"train": {}, "evaluate": {}, "statistics": {}}
    events: dict[tuple, dict] = {}
    unreadable, pending = 0, 0
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                if not line.strip():
                    continue
                unreadable += pending  # the line before this one was not the last
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
    """One line with its numbers as floats, or None where it is torn or is no record of something at an update."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            return None
        record = {key: _floats(value) for key, value in record.items()}
    except (
        ValueError,
        RecursionError,
    ):  # no JSON, bytes that are no text, a number too long, lists without end
        return None
    update, texts = record.get("update"), (record.get(key, "") for key in ("kind", "event", "text"))
    whole = isinstance(update, float) and update.is_integer() and 0 <= update <= LARGEST
    return record if whole and all(isinstance(text, str) for text in texts) else None


def _floats(value: object) -> object:
    """Every number in `value` as a float, also those spelled as text; None for what is neither that nor text."""
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
    """The value as a float where it is a number or the text of one that is not finite; None for all else."""
    if isinstance(value, str):
        return SPELLED.get(value.lower())
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def column(records: list[dict], key: str) -> np.ndarray:
    """`[records]` the values under a key, NaN where a record has no number there."""
    values = (record.get(key) for record in records)
    return np.array([value if isinstance(value, float) else math.nan for value in values], dtype=float)


def layer_columns(records: list[dict], key: str) -> np.ndarray:
    """`[records, layers]` the lists under a key, NaN where a list has no number or is not there."""
    rows = [value if isinstance(value := record.get(key), list) else [] for record in records]
    values = np.full((len(rows), max(map(len, rows), default=0)), math.nan)
    for i, row in enumerate(rows):
        values[i, : len(row)] = [each if isinstance(each, float) else math.nan for each in row]
    return values
