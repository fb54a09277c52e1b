"""What a chart says in words: notes below it, a description for screen readers, and the values under the pointer."""

import json

import numpy as np

from llmjax.quantities import format_duration, format_number
from llmjax.report.chart_axes import Axis
from llmjax.report.charts import Chart, Curve

# How many updates and how many curves a note lists before it ends with an ellipsis.
UPDATES_LISTED = 5
CURVES_LISTED = 4


def describe(chart: Chart, axis: Axis) -> str:
    """The chart in words, for readers who do not see it: the first, last, lowest and highest value of each curve."""
    sentences = [f"{chart.title} over {axis.key}."]
    for curve in chart.curves:
        values = curve.values[np.isfinite(curve.values)]
        if values.size and curve.style != "raw" and curve.keyed:
            first, last, low, high = (
                format_number(v, 4) + chart.suffix
                for v in (values[0], values[-1], values.min(), values.max())
            )
            sentences.append(f"{curve.name}: first {first}, last {last}, lowest {low}, highest {high}.")
    return " ".join(sentences)


def notes(chart: Chart, top: float) -> list[str]:
    """The chart's own note, and a sentence on each curve with values that the drawing cannot show.

    These are values that are not finite, and values above `top`, the upper end of a clipped axis.
    """
    sentences = [chart.note] if chart.note else []
    for curve in chart.curves:
        # A smoothed line has its gaps where the raw line has them, and the raw line's sentence is enough.
        if curve.style == "train" and len(chart.curves) > 1:
            continue
        if "updates" not in curve.x:
            continue
        updates, values = curve.x["updates"], curve.values
        broken = np.flatnonzero(~np.isfinite(values))
        if broken.size:
            # A wide chart may show several curves, so its sentences name the curve.
            start = f"{curve.name}: not" if chart.wide else "Not"
            listed = _listed(updates[broken])
            sentences.append(f"{start} finite at {broken.size:,} of {len(values):,} updates ({listed}).")
        above = np.flatnonzero(np.isfinite(values) & (values > top))
        if above.size:
            peak = above[np.argmax(values[above])]
            sentences.append(
                f"{above.size:,} of {len(values):,} values lie above the axis, the highest "
                f"{format_number(values[peak], 4)}{chart.suffix} at update {updates[peak]:,.0f}."
            )
    return sentences


def log_notes(chart: Chart) -> list[str]:
    """The chart's own note, and one sentence on all values that a logarithmic axis cannot show.

    Such a chart may have a curve for each of many layers, and a sentence for each would be too much.
    """
    sentences = [chart.note] if chart.note else []
    lost = {curve.name: ~(np.isfinite(curve.values) & (curve.values > 0)) for curve in chart.curves}
    names = [name for name, which in lost.items() if which.any()]
    if names:
        updates = np.unique(np.concatenate([c.x["updates"][lost[c.name]] for c in chart.curves]))
        which = ", ".join(names[:CURVES_LISTED]) + (", …" if len(names) > CURVES_LISTED else "")
        sentences.append(
            f"Not drawn, because not finite or not above 0: {which} (update {_listed(updates)})."
        )
    return sentences


def _listed(updates: np.ndarray) -> str:
    """The first few of these numbers of updates, as in `3, 5, 1,200, …`."""
    some = ", ".join(f"{update:,.0f}" for update in updates[:UPDATES_LISTED])
    return some + (", …" if len(updates) > UPDATES_LISTED else "")


def pointer_values(chart: Chart, curves: list[Curve], axes: list[Axis]) -> str:
    """JSON with the texts that the page's script shows for the point under the pointer.

    Args:
      chart: the chart that the curves belong to.
      curves: its curves, thinned to the points that are drawn.
      axes: the horizontal axes.

    Returns {"at": {axis: texts}, "values": [texts of each curve]}. Entry i of a list belongs to the i-th point of a
    drawn path. `at` has the positions of the first curve.
    """
    write = {
        "updates": lambda x: f"{x:,.0f}",
        "tokens": lambda x: format_number(x, 4),
        "time": format_duration,
    }
    for axis in axes:
        if axis.marks:
            write[axis.key] = dict(axis.marks).__getitem__
    # Points that are not finite are not in the paths.
    finite = [np.isfinite(curve.values) for curve in curves]
    at = {axis.key: [write[axis.key](x) for x in curves[0].x[axis.key][finite[0]].tolist()] for axis in axes}
    for point, names in _events_by_point(chart, curves[0], finite[0]).items():
        for texts in at.values():
            texts[point] += f" · {', '.join(names)}"
    values = [
        [format_number(v, 4) + chart.suffix for v in curve.values[shown].tolist()] if curve.keyed else []
        for curve, shown in zip(curves, finite, strict=True)
    ]
    # A name with "</script>" in it must not end the script element that holds the JSON.
    return json.dumps({"at": at, "values": values}, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def _events_by_point(chart: Chart, curve: Curve, shown: np.ndarray) -> dict[int, list[str]]:
    """The names of the events by the number of the drawn point nearest to them, each name once for a point.

    `shown` is bool [points] and true for the points of the curve that are drawn.
    """
    names: dict[int, list[str]] = {}
    for mark in chart.marks if shown.any() else ():
        updates = curve.x["updates"][shown]
        here = names.setdefault(int(np.argmin(np.abs(updates - mark.x["updates"]))), [])
        if mark.name not in here:
            here.append(mark.name)
    return names
