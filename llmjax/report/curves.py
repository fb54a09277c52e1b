"""Makes charts of the lines of metrics.jsonl: chooses the curves, their units, and their positions on the axes."""

import dataclasses
import itertools
import math

import numpy as np

from llmjax.report import chart_axes, charts
from llmjax.workdir.metrics import Metrics, column, layer_columns

# The keys of a line that say where it lies on the horizontal axes.
AXIS_KEYS = ("update", "tokens", "seconds")
# Keys that share the chart of the batch (`batch_chart`) if there is one.
BATCH_KEYS = ("accumulation_steps", "noise_scale")
# Keys that are summed up in a sentence and not drawn.
COUNTED = ("dropped", "skipped")
# Keys that are drawn only if their value changes during the run.
VARYING = ("seq_len",)
# The most layers of a model that are drawn; of a deeper model, layers at even distances. A choice: more lines cannot be
# told apart.
LAYERS_DRAWN = 32
# A held-out curve of at most this many points has a dot at each. A choice: more dots would touch one another.
MOST_MARKERS = 30
# A smoothed line is the mean over about a fortieth of the run. A choice: noise goes, and the shape of the curve stays.
SMOOTHING_WINDOWS = 40


@dataclasses.dataclass(frozen=True)
class Measure:
    """How one key of the training lines is drawn. The fields that are not listed are those of `charts.Chart`.

    scale  values are multiplied by this to turn their unit into `unit`
    noisy  whether the values are drawn faintly, with a smoothed line over them
    """

    title: str
    unit: str
    scale: float = 1.0
    floor: float | None = None
    ceiling: float | None = None
    scales: bool = False
    whole: bool = False
    clip: bool = False
    suffix: str = ""
    noisy: bool = False


# The keys of training lines that are known, in the order of their charts.
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

# The keys of the lines of statistics, with title and unit, in the order of their charts.
LAYER_MEASURES = {
    "gradient_norm": ("Gradient norm by layer", ""),
    "residual_rms": ("Residual stream by layer", "RMS after the layer"),
    "attention_rms": ("Attention by layer", "RMS of its output"),
    "mlp_rms": ("MLP by layer", "RMS of its output"),
    "parameter_norm": ("Parameter norm by layer", ""),
    "gradient_ratio": ("Gradient by parameter norm", ""),
}
# The charts of the first few keys are shown at once, the others only on a click.
LAYERS_SHOWN = 2


# --- positions ---


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the lines of metrics.jsonl lie on the horizontal axes.

    train, evaluate, statistics, events  for each kind of line: float [lines] for each key of an axis
    axes                                 the axes, the one in updates first
    """

    train: dict[str, np.ndarray]
    evaluate: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    events: dict[str, np.ndarray]
    axes: list[chart_axes.Axis]


def positions(metrics: Metrics) -> Positions:
    """Finds where all lines lie on the horizontal axes.

    Training lines know their updates, tokens and seconds. The other lines are placed by their updates among the
    training lines. If there are no training lines, evaluations take their part, and statistics if there are no
    evaluations either. There is no axis in tokens or time if one of these lines lacks that number.
    """
    lines = {
        "train": metrics.train,
        "evaluate": metrics.evaluate,
        "statistics": metrics.statistics,
        "events": metrics.events,
    }
    x = {kind: {"updates": column(records, "update")} for kind, records in lines.items()}
    # The kind whose lines know where tokens and time stand.
    first = next((kind for kind, records in lines.items() if records), "train")
    for axis, key in (("tokens", "tokens"), ("time", "seconds")):
        values = column(lines[first], key)
        if len(values) and np.isfinite(values).all():
            clock = _without_restarts(values)
            # The other lines are interpolated between these points. A run begins at update 0 with tokens and time 0.
            known = np.append(0.0, x[first]["updates"]), np.append(0.0, clock)
            for kind, at in x.items():
                at[axis] = clock if kind == first else np.interp(at["updates"], *known)
    # An axis ends at the last measurement.
    measured = [at for kind, at in x.items() if kind != "events"]
    high = {
        axis: float(max([0.0, *(at[axis].max() for at in measured if len(at[axis]))])) for axis in x[first]
    }
    # An event after the last line is drawn at the end of the axis.
    x["events"] = {axis: np.minimum(at, high[axis]) for axis, at in x["events"].items()}
    axes = [chart_axes.Axis("updates", "updates", high["updates"], whole=True)]
    if "tokens" in high:
        axes.append(chart_axes.Axis("tokens", "tokens", high["tokens"]))
    if "time" in high:
        axes.append(chart_axes.make_time_axis(high["time"]))
    return Positions(**x, axes=axes)


def _without_restarts(clock: np.ndarray) -> np.ndarray:
    """A clock, float [lines], that a resumed run set back, made to run on from where it stood: float [lines]."""
    steps = np.diff(clock, prepend=0.0)
    # A clock that was set back counts from 0 again, so its new value is the time since then.
    return np.cumsum(np.where(steps < 0, np.maximum(clock, 0.0), steps))


# --- charts ---


def loss_chart(metrics: Metrics) -> charts.Chart | None:
    """The chart of the train loss, raw and smoothed, and the held-out loss, with flags for events.

    None if there is neither loss.
    """
    x = positions(metrics)
    lines, note = [], ""
    train_x, loss = _present(metrics.train, "loss", x.train)
    if len(loss):
        smoothed, note = _smoothed(loss, train_x)
        lines += [charts.Curve("train", "raw", train_x, loss), smoothed]
    heldout_x, heldout = _present(metrics.evaluate, "loss", x.evaluate)
    if len(heldout):
        markers = len(heldout) <= MOST_MARKERS
        lines.append(charts.Curve("held-out", "heldout", heldout_x, heldout, markers=markers))
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
    """Two lists of charts: of the known numbers in training lines (`MEASURES`), and of all other numbers in them."""
    train_x, batch = positions(metrics).train, batch_chart(metrics)
    constant = {key for key in VARYING if len({line[key] for line in metrics.train if key in line}) < 2}
    # Keys that have their place elsewhere on the page.
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
    # The batch stands after learning rate and gradient norm.
    return known[:2] + ([batch] if batch else []) + known[2:], others


def batch_chart(metrics: Metrics) -> charts.Chart | None:
    """The chart of the tokens per update and of the gradient noise scale, in tokens both.

    None if the batch is constant and no noise was measured, or if the tokens of the lines are not known.
    """
    x = positions(metrics).train
    steps, noise = (column(metrics.train, key) for key in BATCH_KEYS)
    counts = np.unique(steps[np.isfinite(steps)])
    if "tokens" not in x or (len(counts) < 2 and not np.isfinite(noise).any()):
        return None
    # Not every update has a line. The tokens between two lines are shared out among the updates between them.
    updates = np.diff(x["updates"], prepend=0.0)
    tokens = np.diff(x["tokens"], prepend=0.0) / np.maximum(updates, 1.0)
    lines = [charts.Curve("batch", "train", x, tokens)]
    if np.isfinite(noise).any():
        noise_x, noise = _present(metrics.train, "noise_scale", x)
        lines.append(charts.Curve("noise scale", "heldout", noise_x, noise))
    note = f"An update has {counts[0]:,.0f} to {counts[-1]:,.0f} micro-steps." if len(counts) > 1 else ""
    return charts.Chart("Tokens per update", "", tuple(lines), log=True, note=note)


def batch_changes(metrics: Metrics) -> list[tuple[float, float, float, str]]:
    """Every change of the number of micro-steps: (update, micro-steps before, micro-steps from then on, reason)."""
    lines = [line for line in metrics.train if math.isfinite(line.get("accumulation_steps", math.nan))]
    return [
        (line["update"], last["accumulation_steps"], line["accumulation_steps"], line.get("reason", ""))
        for last, line in itertools.pairwise(lines)
        if line["accumulation_steps"] != last["accumulation_steps"]
    ]


def layer_charts(metrics: Metrics) -> tuple[list[charts.Chart], list[charts.Chart]]:
    """Two lists of charts with a line for each layer: those to show at once, and those to show on a click."""
    x = positions(metrics).statistics
    drawn = {key: _layer_chart(key, metrics.statistics, x) for key in LAYER_MEASURES}
    first = list(LAYER_MEASURES)[:LAYERS_SHOWN]
    shown = [chart for key, chart in drawn.items() if chart and key in first]
    return shown, [chart for key, chart in drawn.items() if chart and key not in first]


def _layer_chart(key: str, records: list[dict], x: dict[str, np.ndarray]) -> charts.Chart | None:
    """The chart of one key of the statistics, or None if no record has it.

    It has a line for each layer, coloured by depth, and one for each block outside of the layers, such as the
    embedding. The legend names only the first and the last layer.
    """
    values = layer_columns(records, key)
    count = values.shape[1]
    if not count:
        return None
    # The first, the last, and others at even distances.
    layers = np.unique(np.linspace(0, count - 1, min(count, LAYERS_DRAWN)).round().astype(int))
    lines = [
        charts.Curve(
            f"layer {i + 1}", "depth", x, values[:, i], depth=i / max(count - 1, 1), keyed=i in (0, count - 1)
        )
        for i in layers
    ]
    # The blocks outside of the layers; a record that is not written as expected counts as having none.
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
    """The chart of one number of the training lines, whose positions are `train_x`."""
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
    """Positions and values of the records that have the key, float [records that have it] each.

    Records without the key are left out, so that the curve has no gap where nothing was measured.
    """
    has = np.array([isinstance(record.get(key), float) for record in records], dtype=bool)
    return {axis: positions[has] for axis, positions in x.items()}, column(records, key)[has]


def _smoothed(values: np.ndarray, x: dict[str, np.ndarray]) -> tuple[charts.Curve, str]:
    """The smoothed line, and a sentence that says how it was made."""
    half = max(2, len(values) // (2 * SMOOTHING_WINDOWS))
    note = f"The mean is centred over {2 * half + 1:,} updates."
    return charts.Curve("mean", "train", x, chart_axes.smooth(values, half)), note
