"""From the lines of metrics.jsonl to the charts of a report: which curves, in which units, on which axes.

A clock that restarts with a resumed run is made to run on.
"""

import dataclasses
import itertools
import math

import numpy as np

from llmjax.report import chart_axes, charts
from llmjax.workdir.metrics import Metrics, column, layer_columns

AXIS_KEYS = ("update", "tokens", "seconds")
BATCH_KEYS = (
    "accumulation_steps",
    "noise_scale",
)  # drawn together, in tokens, where there is more than one k
COUNTED = ("dropped", "skipped")  # told in words
VARYING = ("seq_len",)  # drawn only where it changes
LAYERS_DRAWN = 32  # at most; of a deeper model, layers at even distances are drawn


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
    "seq_len": Measure("Sequence length", "tokens", floor=0, whole=True),
    "mfu": Measure("FLOPs utilisation", "of peak", 100, floor=0, suffix="%", noisy=True),
}


LAYER_MEASURES = {  # of the lines of statistics: title and unit; the first two are shown, the others folded
    "gradient_norm": ("Gradient norm by layer", ""),
    "residual_rms": ("Residual stream by layer", "RMS after the layer"),
    "attention_rms": ("Attention by layer", "RMS of its output"),
    "mlp_rms": ("MLP by layer", "RMS of its output"),
    "parameter_norm": ("Parameter norm by layer", ""),
    "gradient_ratio": ("Gradient by parameter norm", ""),
}
LAYERS_SHOWN = 2


# --- positions ---


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the lines of each kind stand on each horizontal axis, by its key, and these axes."""

    train: dict[str, np.ndarray]
    evaluate: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    events: dict[str, np.ndarray]
    axes: list[chart_axes.Axis]


def positions(metrics: Metrics) -> Positions:
    """Positions on the clock of the training lines.

    Other lines stand at the tokens and the time of the training line of their update; without training lines
    the evaluations have the clock, and without those the statistics. An axis that not all its lines know is
    left out.
    """
    lines = {
        "train": metrics.train,
        "evaluate": metrics.evaluate,
        "statistics": metrics.statistics,
        "events": metrics.events,
    }
    x = {kind: {"updates": column(records, "update")} for kind, records in lines.items()}
    first = next((kind for kind, records in lines.items() if records), "train")
    for axis, key in (("tokens", "tokens"), ("time", "seconds")):
        values = column(lines[first], key)
        if len(values) and np.isfinite(values).all():
            clock = _running_on(values)
            known = np.append(0.0, x[first]["updates"]), np.append(0.0, clock)
            for kind, at in x.items():
                at[axis] = clock if kind == first else np.interp(at["updates"], *known)
    measured = [at for kind, at in x.items() if kind != "events"]
    high = {
        axis: float(max([0.0, *(at[axis].max() for at in measured if len(at[axis]))])) for axis in x[first]
    }
    x["events"] = {axis: np.minimum(at, high[axis]) for axis, at in x["events"].items()}
    axes = [chart_axes.Axis("updates", "updates", high["updates"], whole=True)]
    if "tokens" in high:
        axes.append(chart_axes.Axis("tokens", "tokens", high["tokens"]))
    if "time" in high:
        axes.append(chart_axes.make_time_axis(high["time"]))
    return Positions(**x, axes=axes)


def _running_on(clock: np.ndarray) -> np.ndarray:
    """The clock with every step back replaced by no step, as for a resumed run that counts from 0 again."""
    steps = np.diff(clock, prepend=0.0)
    return np.cumsum(np.where(steps < 0, np.maximum(clock, 0.0), steps))


# --- charts ---


def loss_chart(metrics: Metrics) -> charts.Chart | None:
    """Train loss, faint as it was and smoothed, with the held-out loss; None where there is neither.

    Events are marked.
    """
    x = positions(metrics)
    lines, note = [], ""
    train_x, loss = _present(metrics.train, "loss", x.train)
    if len(loss):
        smoothed, note = _smoothed(loss, train_x)
        lines += [charts.Curve("train", "raw", train_x, loss), smoothed]
    heldout_x, heldout = _present(metrics.evaluate, "loss", x.evaluate)
    if len(heldout):
        lines.append(charts.Curve("held-out", "heldout", heldout_x, heldout, markers=len(heldout) <= 30))
    if not lines:
        return None
    marks = tuple(
        charts.Mark(str(event.get("event")), {axis: float(at[i]) for axis, at in x.events.items()})
        for i, event in enumerate(metrics.events)
    )
    if marks:
        note = f"{note} Flags mark events, listed below.".lstrip()
    return charts.Chart(
        "Loss", "nats per token", tuple(lines), wide=True, scales=True, note=note, marks=marks
    )


def measure_charts(metrics: Metrics) -> tuple[list[charts.Chart], list[charts.Chart]]:
    """The charts of the known measurements, and a chart for every other number that training lines hold."""
    train_x, batch = positions(metrics).train, batch_chart(metrics)
    constant = {key for key in VARYING if len({line[key] for line in metrics.train if key in line}) < 2}
    drawn = {*AXIS_KEYS, *COUNTED, *constant, "loss", *(BATCH_KEYS if batch else ())}
    keys = sorted(
        {key for record in metrics.train for key, value in record.items() if isinstance(value, float)} - drawn
    )
    known = [_measure_chart(key, MEASURES[key], metrics, train_x) for key in MEASURES if key in keys]
    others = [
        _measure_chart(key, Measure(key, "", clip=True), metrics, train_x)
        for key in keys
        if key not in MEASURES
    ]
    return known[:2] + ([batch] if batch else []) + known[2:], others


def batch_chart(metrics: Metrics) -> charts.Chart | None:
    """Tokens per update beside the gradient noise scale; None where the batch is constant and no noise was measured."""
    x = positions(metrics).train
    steps, noise = (column(metrics.train, key) for key in BATCH_KEYS)
    counts = np.unique(steps[np.isfinite(steps)])
    if "tokens" not in x or (len(counts) < 2 and not np.isfinite(noise).any()):
        return None
    updates = np.diff(x["updates"], prepend=0.0)  # more than 1 where lines are missing
    tokens = np.diff(x["tokens"], prepend=0.0) / np.maximum(updates, 1.0)
    lines = [charts.Curve("batch", "train", x, tokens)]
    if np.isfinite(noise).any():
        noise_x, noise = _present(metrics.train, "noise_scale", x)
        lines.append(charts.Curve("noise scale", "heldout", noise_x, noise))
    note = f"An update has {counts[0]:,.0f} to {counts[-1]:,.0f} micro-steps." if len(counts) > 1 else ""
    return charts.Chart("Tokens per update", "", tuple(lines), log=True, note=note)


def batch_changes(metrics: Metrics) -> list[tuple[float, float, float, str]]:
    """(update, micro-steps before, micro-steps now, reason) of each update with another number of them."""
    lines = [line for line in metrics.train if math.isfinite(line.get("accumulation_steps", math.nan))]
    return [
        (line["update"], last["accumulation_steps"], line["accumulation_steps"], line.get("reason", ""))
        for last, line in itertools.pairwise(lines)
        if line["accumulation_steps"] != last["accumulation_steps"]
    ]


def layer_charts(metrics: Metrics) -> tuple[list[charts.Chart], list[charts.Chart]]:
    """Charts with a line for each layer, coloured by depth: those that show gradients and activations, and others."""
    x = positions(metrics).statistics
    drawn = {key: _layer_chart(key, metrics.statistics, x) for key in LAYER_MEASURES}
    shown = list(LAYER_MEASURES)[:LAYERS_SHOWN]
    present = [(key in shown, chart) for key, chart in drawn.items() if chart]
    return [chart for first, chart in present if first], [chart for first, chart in present if not first]


def _layer_chart(key: str, records: list[dict], x: dict[str, np.ndarray]) -> charts.Chart | None:
    values = layer_columns(records, key)
    count = values.shape[1]
    if not count:
        return None
    layers = np.unique(np.linspace(0, count - 1, min(count, LAYERS_DRAWN)).round().astype(int))
    lines = [
        charts.Curve(
            f"layer {i + 1}", "depth", x, values[:, i], depth=i / max(count - 1, 1), keyed=i in (0, count - 1)
        )
        for i in layers
    ]
    others = [record["other"] if isinstance(record.get("other"), dict) else {} for record in records]
    for block in sorted({name for other in others for name in other}):
        of_block = [other[block] if isinstance(other.get(block), dict) else {} for other in others]
        block_x, block_values = _present(of_block, key, x)
        if len(block_values):
            lines.append(charts.Curve(block.replace("_", " "), "other", block_x, block_values))
    note = f"{len(layers)} of {count} layers are drawn." if len(layers) < count else ""
    return charts.Chart(*LAYER_MEASURES[key], tuple(lines), tall=True, log=True, note=note)


def _measure_chart(
    key: str, measure: Measure, metrics: Metrics, train_x: dict[str, np.ndarray]
) -> charts.Chart:
    train_x, values = _present(metrics.train, key, train_x)
    values = measure.scale * values
    lines: tuple[charts.Curve, ...] = (
        charts.Curve("each", "raw", train_x, values),
        _smoothed(values, train_x)[0],
    )
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
    has = np.array([isinstance(record.get(key), float) for record in records], dtype=bool)
    return {axis: positions[has] for axis, positions in x.items()}, column(records, key)[has]


def _smoothed(values: np.ndarray, x: dict[str, np.ndarray]) -> tuple[charts.Curve, str]:
    """The smoothed line, and the sentence that says how it was made."""
    half = max(2, len(values) // 80)
    note = f"The mean is centred over {2 * half + 1:,} updates."
    return charts.Curve("mean", "train", x, chart_axes.smooth(values, half)), note
