"""From the lines of metrics.jsonl to the charts of a report: which curves, in which units, on which axes.

A metrics file is written by a run that may be killed at any moment, so reading is forgiving: a torn last line
is dropped, other unreadable lines are counted, an update that was written twice counts once (the later line),
and a clock that restarts with a resumed run is made to run on.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np

from llmjax.train import charts

AXIS_KEYS = ("update", "tokens", "seconds")
SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The lines of a run by kind, in the order of updates."""

    train: list[dict]
    evaluate: list[dict]
    unreadable: int = 0


@dataclasses.dataclass(frozen=True)
class Measure:
    """How one key of the training lines is drawn; `scale` turns its unit into the one shown."""

    title: str
    unit: str
    scale: float = 1.0
    floor: float | None = None
    ceiling: float | None = None
    scales: bool = False
    whole: bool = False
    clip: bool = False
    suffix: str = ""
    noisy: bool = False  # faint as it was, with a smoothed line


MEASURES = {
    "learning_rate": Measure("Learning rate", "", floor=0),
    "grad_norm": Measure("Gradient norm", "", floor=0, scales=True, clip=True, noisy=True),
    "tokens_per_second": Measure("Throughput", "tokens/s", floor=0, noisy=True),
    "accumulation_steps": Measure("Accumulation", "micro-steps/update", floor=0, whole=True),
    "packing_efficiency": Measure("Packing efficiency", "", 100, ceiling=100, suffix="%", noisy=True),
    "data_wait": Measure("Data wait", "ms/update", 1000, floor=0, clip=True, noisy=True),
    "mfu": Measure("FLOPs utilisation", "of peak", 100, floor=0, suffix="%", noisy=True),
}


def read_metrics(path: pathlib.Path) -> Metrics:
    """Reads metrics.jsonl; a file that does not exist has no lines."""
    kinds: dict[str, dict[int, dict]] = {"train": {}, "evaluate": {}}
    unreadable, pending = 0, 0
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                unreadable += pending  # the line before this one was not the last
                pending = 0
                record = _record(line)
                if record is None:
                    pending = 1
                elif record["kind"] in kinds:
                    kinds[record["kind"]][int(record["update"])] = record
    train, evaluate = ([lines[update] for update in sorted(lines)] for lines in kinds.values())
    return Metrics(train, evaluate, unreadable)


def _record(line: str) -> dict | None:
    """One line with its numbers as floats, or None where it is not a record of a kind at an update."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    record = {key: value if key == "kind" else number(value) for key, value in record.items()}
    update = record.get("update")
    is_record = isinstance(record.get("kind"), str) and update is not None and math.isfinite(update)
    return record if is_record else None


def number(value: object) -> float | None:
    """The value as a float where it is a number or the text of one that is not finite; None for all else."""
    if isinstance(value, str):
        return SPELLED.get(value.lower())
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def column(records: list[dict], key: str) -> np.ndarray:
    """`[records]` the values under a key, NaN where a record does not have it."""
    return np.array([math.nan if record.get(key) is None else record[key] for record in records], dtype=float)


# --- positions ---


def positions(metrics: Metrics) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[charts.Axis]]:
    """Where the training lines and the evaluations stand on each horizontal axis, and these axes.

    Evaluations stand at the tokens and the time of the training line of their update, so that both curves
    share one clock; without training lines they use their own. An axis that not all lines know is left out.
    """
    train = {"updates": column(metrics.train, "update")}
    heldout = {"updates": column(metrics.evaluate, "update")}
    for axis, key in (("tokens", "tokens"), ("time", "seconds")):
        values = column(metrics.train, key)
        if len(values) and np.isfinite(values).all():
            train[axis] = _running_on(values)
            known = np.append(0.0, train["updates"]), np.append(0.0, train[axis])
            heldout[axis] = np.interp(heldout["updates"], *known)
        elif not metrics.train and np.isfinite(column(metrics.evaluate, key)).all():
            heldout[axis] = column(metrics.evaluate, key)
    high = {axis: float(max([0.0, *train.get(axis, ())[-1:], *heldout[axis][-1:]])) for axis in heldout}
    axes = [charts.Axis("updates", "updates", high["updates"], whole=True)]
    if "tokens" in high:
        axes.append(charts.Axis("tokens", "tokens", high["tokens"]))
    if "time" in high:
        axes.append(charts.make_time_axis(high["time"]))
    return train, heldout, axes


def _running_on(clock: np.ndarray) -> np.ndarray:
    """The clock with every step back replaced by no step, as for a resumed run that counts from 0 again."""
    steps = np.diff(clock, prepend=0.0)
    return np.cumsum(np.where(steps < 0, np.maximum(clock, 0.0), steps))


# --- charts ---


def loss_chart(metrics: Metrics) -> charts.Chart | None:
    """Train loss, faint as it was and smoothed, with the held-out loss; None where there is neither."""
    train_x, heldout_x, _ = positions(metrics)
    lines, note = [], ""
    train_x, loss = _present(metrics.train, "loss", train_x)
    if len(loss):
        smoothed, note = _smoothed(loss, train_x)
        lines += [charts.Curve("train", "raw", train_x, loss), smoothed]
    heldout_x, heldout = _present(metrics.evaluate, "loss", heldout_x)
    if len(heldout):
        lines.append(charts.Curve("held-out", "heldout", heldout_x, heldout, markers=len(heldout) <= 30))
    return (
        charts.Chart("Loss", "nats per token", tuple(lines), wide=True, scales=True, note=note)
        if lines
        else None
    )


def measure_charts(metrics: Metrics) -> tuple[list[charts.Chart], list[charts.Chart]]:
    """The charts of the known measurements, and those of every other number that training lines hold."""
    train_x, _, _ = positions(metrics)
    keys = sorted(
        {key for record in metrics.train for key, value in record.items() if isinstance(value, float)}
    )
    others = [key for key in keys if key not in (*AXIS_KEYS, "loss", *MEASURES)]
    known = [_measure_chart(key, MEASURES[key], metrics, train_x) for key in MEASURES if key in keys]
    return known, [_measure_chart(key, Measure(key, "", clip=True), metrics, train_x) for key in others]


def _measure_chart(
    key: str, measure: Measure, metrics: Metrics, train_x: dict[str, np.ndarray]
) -> charts.Chart:
    train_x, values = _present(metrics.train, key, train_x)
    values = measure.scale * values
    lines = (charts.Curve("each", "raw", train_x, values), _smoothed(values, train_x)[0])
    if not measure.noisy:
        lines = (charts.Curve(measure.title, "train", train_x, values),)
    fields = {
        field: getattr(measure, field) for field in ("floor", "ceiling", "scales", "whole", "clip", "suffix")
    }
    return charts.Chart(measure.title, measure.unit, lines, **fields)


def _present(
    records: list[dict], key: str, x: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Positions and values of the records that have the key; what was not measured is no gap in the curve."""
    has = np.array([record.get(key) is not None for record in records], dtype=bool)
    return {axis: positions[has] for axis, positions in x.items()}, column(records, key)[has]


def _smoothed(values: np.ndarray, x: dict[str, np.ndarray]) -> tuple[charts.Curve, str]:
    """The smoothed line, and the sentence that says how it was made."""
    half = max(2, len(values) // 80)
    note = f"The mean is centred over {2 * half + 1:,} updates."
    return charts.Curve("mean", "train", x, charts.smooth(values, half)), note
