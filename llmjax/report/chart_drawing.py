"""Draws a chart as one HTML figure: a caption with a legend, SVG drawings, notes, and the values under the pointer.

A chart is drawn once for each pair of a horizontal axis (updates, tokens, time) and a vertical range (linear,
logarithmic, close-up). All drawings are in the page, and its style sheet shows one of them at a time, so that the page
needs no JavaScript to switch between them.
"""

import dataclasses
import html

import numpy as np

from llmjax.quantities import format_number
from llmjax.report.chart_axes import Axis, domain, thin
from llmjax.report.chart_svg import depth_colour, draw_plot
from llmjax.report.chart_texts import log_notes, notes, pointer_values
from llmjax.report.charts import Chart, Curve

# The most points of a curve in a chart as wide as the page, and in one of half that width. A choice: about one point
# for each pixel of a usual screen.
POINTS_WIDE = 1000
POINTS_NARROW = 500
# The most points of all curves of a chart together, and the points that each curve keeps however many there are. A
# choice: they keep the page small enough to be sent as a file.
POINTS_CHART = 4000
LEAST_POINTS = 100
# The share of the run that the close-up leaves out. A choice: the loss falls fastest in the first quarter.
CLOSE_UP_FROM = 0.25


def draw_chart(chart: Chart, axes: list[Axis]) -> str:
    """The chart as an HTML figure, drawn for each of the horizontal `axes`; its curves must have positions on all."""
    everything = np.concatenate([curve.values for curve in chart.curves])
    finite = everything[np.isfinite(everything)]
    if chart.log:
        finite = finite[finite > 0]
    title = f'<h3>{html.escape(chart.title)}</h3><span class="unit">{html.escape(chart.unit)}</span>'
    if not finite.size:
        nothing = '<p class="note">No finite values.</p>'
        return f'<figure class="chart"><figcaption>{title}</figcaption>{nothing}</figure>'
    ranges = _vertical_ranges(chart, finite)
    share = max(POINTS_CHART // len(chart.curves), LEAST_POINTS)
    limit = min(POINTS_WIDE if chart.wide else POINTS_NARROW, share)
    # The drawings have thinned curves. The legend and the notes are about all values.
    thinned = [_thinned(curve if not chart.log else _positive(curve), limit) for curve in chart.curves]
    plots = "".join(
        draw_plot(chart, thinned, axis, scale, span) for scale, span in ranges.items() for axis in axes
    )
    legend = "".join(_legend_entry(curve, chart, i) for i, curve in enumerate(chart.curves) if curve.keyed)
    # The style sheet needs to know which ranges there are, to fall back on the linear one.
    classes = (
        "chart"
        + " wide" * chart.wide
        + " tall" * chart.tall
        + "".join(f" has-{name}" for name in ("log", "close") if name in ranges)
    )
    sentences = log_notes(chart) if chart.log else notes(chart, ranges["linear"][1])
    below = "".join(f'<p class="note">{html.escape(note)}</p>' for note in sentences)
    return (
        f'<figure class="{classes}"><figcaption>{title}<span class="keys">{legend}</span></figcaption>'
        f'<div class="frame">{plots}</div>{below}'
        f'<script type="application/json">{pointer_values(chart, thinned, axes)}</script></figure>'
    )


def _vertical_ranges(chart: Chart, finite: np.ndarray) -> dict[str, tuple[float, float]]:
    """The lowest and highest value of each vertical axis to draw the chart with.

    The keys are parts of CSS classes: `linear`, `log` and `close` (the close-up) can be switched between, and `only` is
    the logarithmic axis of a chart that has no other.
    """
    if chart.log:
        return {"only": _log_domain(finite)}
    ranges = {"linear": domain(finite, chart.floor, chart.ceiling, chart.clip)}
    if chart.scales and finite.min() > 0:
        ranges["log"] = _log_domain(finite)
    if chart.scales:
        late = np.concatenate(
            [c.values[c.x["updates"] > CLOSE_UP_FROM * max(c.x["updates"], default=0)] for c in chart.curves]
        )
        late = late[np.isfinite(late)]
        if len(late) > 2:
            ranges["close"] = domain(late, None, None)
    return ranges


def _log_domain(values: np.ndarray) -> tuple[float, float]:
    """The range of a logarithmic axis over positive values, with 5% of its length left free at each end."""
    low, high = float(np.min(values)), float(np.max(values))
    margin = (high / low) ** 0.05 if high > low else 2.0
    return low / margin, high * margin


def _positive(curve: Curve) -> Curve:
    """The curve with gaps in place of values that have no logarithm."""
    return dataclasses.replace(curve, values=np.where(curve.values > 0, curve.values, np.nan))


def _thinned(curve: Curve, limit: int) -> Curve:
    """The curve with at most `limit` of its points."""
    index = thin(curve.values, limit)
    return dataclasses.replace(curve, values=curve.values[index], x={k: x[index] for k, x in curve.x.items()})


def _legend_entry(curve: Curve, chart: Chart, number: int) -> str:
    """The name of curve `number` in its colour, and its last finite value, which the page's script replaces by the
    value under the pointer. The only curve of a chart is named by the chart's title."""
    last = curve.values[np.isfinite(curve.values)][-1:]
    value = format_number(last[0], 4) + chart.suffix if last.size else "–"
    named = len(chart.curves) > 1 or curve.style == "heldout"
    swatch = (
        f'<i class="swatch {curve.style}"{depth_colour(curve)}></i>{html.escape(curve.name)} '
        if named
        else ""
    )
    return f'<span class="key">{swatch}<output data-curve="{number}">{value}</output></span>'
