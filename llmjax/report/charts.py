"""Line charts as inline SVG: readable without JavaScript, sharp at any width, plain strings all the way.

A chart is drawn once for every horizontal axis (updates, tokens, time) and, where asked for, again with other
vertical axes; the page shows one of these drawings at a time. Positions are percentages of an SVG element
without a viewBox, so the browser stretches the curves and leaves text and line widths alone. The curves
themselves live in a nested, non-uniformly scaled viewBox, which also clips them.
"""

import dataclasses
import html
import json
import math
from collections.abc import Callable

import numpy as np

from llmjax.quantities import format_duration, format_number
from llmjax.report.chart_axes import (
    Axis,
    apart,
    domain,
    log_ticks,
    thin,
    tick_labels,
    ticks,
)

POINTS_WIDE = 1000  # most points of a curve in a chart as wide as the page
POINTS_NARROW = 500  # the same in a chart of half that width
POINTS_CHART = 4000  # of all curves together, where there are many, but 100 of each at least
BOX_WIDTH, BOX_HEIGHT = 4000, 1000  # the viewBox of the curves; whole numbers in it are finer than a pixel
RIM = 8  # in these units, above and below: else a line along the edge would be cut to half its width


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line. `x` maps each axis key to positions; these and `values` are all of one length."""

    name: str
    style: str  # a CSS class: raw, train, heldout, depth or other
    x: dict[str, np.ndarray]
    values: np.ndarray
    markers: bool = False
    depth: float = 0.0  # of style depth: where between the first layer (0) and the last (1), for its colour
    keyed: bool = True  # named in the caption, with its value


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened, at a position on each axis."""

    name: str
    x: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A title, a unit and the curves that share one vertical axis."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    wide: bool = False
    floor: float | None = None  # the axis reaches down to it
    ceiling: float | None = None  # the axis ends at it
    scales: bool = (
        False  # also offer a logarithmic axis, if all values are positive, and a close-up of the later part
    )
    whole: bool = False  # counts: ticks at whole numbers only
    clip: bool = False  # rare values far above all others may leave the axis; the note then names them
    tall: bool = False  # for many curves
    log: bool = False  # a logarithmic axis only; what is not above 0 is left out, and the note says so
    suffix: str = ""  # follows every number, as in 98.7%
    marks: tuple[Mark, ...] = ()
    note: str = ""  # a sentence below the chart


# --- drawing ---


def draw_chart(chart: Chart, axes: list[Axis]) -> str:
    """The chart as one HTML figure: caption with keys and last values, SVG drawings, notes, hover values."""
    everything = np.concatenate([curve.values for curve in chart.curves])
    finite = everything[np.isfinite(everything)]
    if chart.log:
        finite = finite[finite > 0]
    title = f'<h3>{html.escape(chart.title)}</h3><span class="unit">{html.escape(chart.unit)}</span>'
    if not finite.size:
        nothing = '<p class="note">No finite values.</p>'
        return f'<figure class="chart"><figcaption>{title}</figcaption>{nothing}</figure>'
    scales = _scales(chart, finite)
    many = max(POINTS_CHART // len(chart.curves), 100)
    limit = min(POINTS_WIDE if chart.wide else POINTS_NARROW, many)
    kept = [_thinned(curve if not chart.log else _positive(curve), limit) for curve in chart.curves]
    plots = "".join(_plot(chart, kept, axis, scale, span) for scale, span in scales.items() for axis in axes)
    keys = "".join(_key(curve, chart, i) for i, curve in enumerate(chart.curves) if curve.keyed)
    classes = (
        "chart"
        + " wide" * chart.wide
        + " tall" * chart.tall
        + "".join(f" has-{name}" for name in ("log", "close") if name in scales)
    )
    spoken = _log_notes(chart) if chart.log else _notes(chart, scales["linear"][1])
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in spoken)
    return (
        f'<figure class="{classes}"><figcaption>{title}<span class="keys">{keys}</span></figcaption>'
        f'<div class="frame">{plots}</div>{notes}'
        f'<script type="application/json">{_hover_values(chart, kept, axes)}</script></figure>'
    )


def _scales(chart: Chart, finite: np.ndarray) -> dict[str, tuple[float, float]]:
    """The ranges of the vertical axes on offer; the close-up fits what comes after the first quarter."""
    if chart.log:
        return {"only": _log_domain(finite)}
    scales = {"linear": domain(finite, chart.floor, chart.ceiling, chart.clip)}
    if chart.scales and finite.min() > 0:
        scales["log"] = _log_domain(finite)
    if chart.scales:
        late = np.concatenate(
            [c.values[c.x["updates"] > 0.25 * max(c.x["updates"], default=0)] for c in chart.curves]
        )
        late = late[np.isfinite(late)]
        if len(late) > 2:
            scales["close"] = domain(late, None, None)
    return scales


def _log_domain(values: np.ndarray) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    air = (high / low) ** 0.05 if high > low else 2.0
    return low / air, high * air


def _positive(curve: Curve) -> Curve:
    return dataclasses.replace(curve, values=np.where(curve.values > 0, curve.values, np.nan))


def _thinned(curve: Curve, limit: int) -> Curve:
    """The points that are drawn, each curve thinned by itself."""
    index = thin(curve.values, limit)
    return dataclasses.replace(curve, values=curve.values[index], x={k: x[index] for k, x in curve.x.items()})


def _key(curve: Curve, chart: Chart, number: int) -> str:
    last = curve.values[np.isfinite(curve.values)][-1:]
    value = format_number(last[0], 4) + chart.suffix if last.size else "–"
    named = len(chart.curves) > 1 or curve.style == "heldout"
    swatch = (
        f'<i class="swatch {curve.style}"{_colour(curve)}></i>{html.escape(curve.name)} ' if named else ""
    )
    return f'<span class="key">{swatch}<output data-curve="{number}">{value}</output></span>'


def _colour(curve: Curve) -> str:
    """What the style sheet cannot know: how deep a layer lies."""
    return f' style="--depth:{100 * curve.depth:.0f}%"' if curve.style == "depth" else ""


def _plot(chart: Chart, kept: list[Curve], axis: Axis, scale: str, span: tuple[float, float]) -> str:
    """One drawing: grid and labels, then the clipped curves, then what must keep its shape (dots)."""
    is_log = scale in ("log", "only")
    bend = math.log10 if is_log else float
    bottom, top = bend(span[0]), bend(span[1])

    def height(value: float) -> float:
        return min(max((top - bend(value)) / (top - bottom), -3.0), 4.0)  # past the edge is past the edge

    y_marks = log_ticks(*span) if is_log else ticks(*span, 6 if chart.wide else 5, chart.whole)
    paths, dots = [], []
    for curve in kept:
        points = [
            (x / axis.high if axis.high else 0.0, height(y) if math.isfinite(y) else math.nan)
            for x, y in zip(curve.x[axis.key].tolist(), curve.values.tolist(), strict=True)
        ]
        paths.append(f'<path class="curve {curve.style}"{_colour(curve)} d="{_path(points)}"/>')
        dots.extend(_dots(points, curve))
    return (
        f'<svg class="plot x-{axis.key} y-{scale}" role="img"'
        f' aria-label="{html.escape(_spoken(chart, axis))}">'
        f"{_grid(axis, y_marks, height, chart)}{_marks(chart, axis)}"
        f'<svg y="{-100 * RIM / BOX_HEIGHT}%" width="100%" height="{100 + 200 * RIM / BOX_HEIGHT}%" '
        f'viewBox="0 {-RIM} {BOX_WIDTH} {BOX_HEIGHT + 2 * RIM}" preserveAspectRatio="none">'
        f"{''.join(paths)}</svg>{''.join(dots)}</svg>"
    )


def _marks(chart: Chart, axis: Axis) -> str:
    """A line with a flag for each thing that happened; those in the same place are drawn once."""
    places = {f"{100 * mark.x[axis.key] / axis.high if axis.high else 0:.1f}%" for mark in chart.marks}
    return "".join(
        f'<line class="mark" x1="{at}" x2="{at}" y2="100%"/>'
        f'<svg class="flag" x="{at}" overflow="visible"><path d="M-4.5-7h9L0 1z"/></svg>'
        for at in sorted(places)
    )


def _grid(axis: Axis, y_marks: list[float], height: Callable[[float], float], chart: Chart) -> str:
    """Grid lines and tick labels; every second label of the horizontal axis gives way on a narrow screen."""
    parts = []
    for mark, label in zip(y_marks, tick_labels(y_marks), strict=True):
        at = f"{100 * height(mark):.2f}%"
        parts.append(f'<line class="rule" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="y tick" x="-8" y="{at}" dy=".33em">{label}{chart.suffix}</text>')
    high, count = axis.high / axis.divisor, 9 if chart.wide else 5
    x_marks = ticks(0, high, count, axis.whole)
    labelled = apart(axis.marks, high / (count + 2)) or list(zip(x_marks, tick_labels(x_marks), strict=True))
    for i, (mark, label) in enumerate(labelled):
        at = f"{100 * mark / high if high else 0:.2f}%"
        spare = " spare" * (i % 2)
        parts.append(f'<text class="x tick{spare}" x="{at}" y="100%" dy="1.55em">{label}</text>')
    parts.append('<line class="base" x2="100%" y1="100%" y2="100%"/>')
    parts.append(f'<text class="axis" x="100%" y="100%" dy="2.9em">{axis.label}</text>')
    return "".join(parts)


def _path(points: list[tuple[float, float]]) -> str:
    """The path through the finite points; the pen is lifted over each gap."""
    parts, pen = [], "M"
    for x, y in points:
        if math.isnan(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x * BOX_WIDTH:.0f},{y * BOX_HEIGHT:.0f}")
        pen = "L"
    return "".join(parts)


def _dots(points: list[tuple[float, float]], curve: Curve) -> list[str]:
    """Markers where the curve has them, else a dot for each point without a neighbour to draw a line to."""
    drawn = [math.isfinite(y) for _, y in points]
    dots = []
    for i, (x, y) in enumerate(points):
        lonely = not any(drawn[max(i - 1, 0) : i] + drawn[i + 1 : i + 2])
        if drawn[i] and (curve.markers or lonely) and 0 <= y <= 1:
            dots.append(
                f'<circle class="dot {curve.style}"{_colour(curve)} cx="{100 * x:.2f}%" cy="{100 * y:.2f}%" r="3.5"/>'
            )
    return dots


def _spoken(chart: Chart, axis: Axis) -> str:
    """The chart in words, for those who do not see it."""
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


def _notes(chart: Chart, top: float) -> list[str]:
    """What the drawing cannot show: values that are not finite or lie above a clipped axis."""
    notes = [chart.note] if chart.note else []
    for curve in chart.curves:
        if curve.style == "train" and len(chart.curves) > 1:
            continue  # the smoothed line repeats what its raw line says
        if "updates" not in curve.x:
            continue
        updates, values = curve.x["updates"], curve.values
        broken = np.flatnonzero(~np.isfinite(values))
        if broken.size:
            some = ", ".join(f"{updates[i]:,.0f}" for i in broken[:5]) + (", …" if broken.size > 5 else "")
            who = f"{curve.name}: not" if chart.wide else "Not"
            notes.append(f"{who} finite at {broken.size:,} of {len(values):,} updates ({some}).")
        above = np.flatnonzero(np.isfinite(values) & (values > top))
        if above.size:
            peak = above[np.argmax(values[above])]
            notes.append(
                f"{above.size:,} of {len(values):,} values lie above the axis, the highest "
                f"{format_number(values[peak], 4)}{chart.suffix} at update {updates[peak]:,.0f}."
            )
    return notes


def _log_notes(chart: Chart) -> list[str]:
    """The notes of a chart with a logarithmic axis. One sentence stands for all curves, which may be many layers."""
    notes = [chart.note] if chart.note else []
    lost = {curve.name: ~(np.isfinite(curve.values) & (curve.values > 0)) for curve in chart.curves}
    names = [name for name, which in lost.items() if which.any()]
    if names:
        updates = np.unique(np.concatenate([c.x["updates"][lost[c.name]] for c in chart.curves]))
        who = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        some = ", ".join(f"{update:,.0f}" for update in updates[:5]) + (", …" if len(updates) > 5 else "")
        notes.append(f"Not drawn, because not finite or not above 0: {who} (update {some}).")
    return notes


def _hover_values(chart: Chart, kept: list[Curve], axes: list[Axis]) -> str:
    """JSON for the read-out: the texts of each curve's drawn points, and where those of the first are."""
    write = {
        "updates": lambda x: f"{x:,.0f}",
        "tokens": lambda x: format_number(x, 4),
        "time": format_duration,
    }
    for axis in axes:
        if axis.marks:
            write[axis.key] = dict(axis.marks).__getitem__
    finite = [np.isfinite(curve.values) for curve in kept]
    at = {axis.key: [write[axis.key](x) for x in kept[0].x[axis.key][finite[0]].tolist()] for axis in axes}
    for point, names in _marked_points(chart, kept[0], finite[0]).items():
        for texts in at.values():
            texts[point] += f" · {', '.join(names)}"
    values = [
        [format_number(v, 4) + chart.suffix for v in curve.values[shown].tolist()] if curve.keyed else []
        for curve, shown in zip(kept, finite, strict=True)
    ]
    return json.dumps({"at": at, "values": values}, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def _marked_points(chart: Chart, curve: Curve, shown: np.ndarray) -> dict[int, list[str]]:
    """The names of what happened, by the drawn point nearest to it."""
    names: dict[int, list[str]] = {}
    for mark in chart.marks if shown.any() else ():
        updates = curve.x["updates"][shown]
        here = names.setdefault(int(np.argmin(np.abs(updates - mark.x["updates"]))), [])
        if mark.name not in here:
            here.append(mark.name)
    return names
