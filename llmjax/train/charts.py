"""Line charts as inline SVG: readable without JavaScript, sharp at any width, plain strings all the way.

A chart is drawn once for every horizontal axis (updates, tokens, time) and, where asked for, again with other
vertical axes; the page shows one of these drawings at a time. Positions are percentages of an SVG element
without a viewBox, so the browser stretches the curves and leaves text and line widths alone. The curves
themselves live in a nested, non-uniformly scaled viewBox, which also clips them.

Long curves are thinned to the lowest and the highest value of every bucket of neighbours. A bucket mean would
be shorter, but it hides exactly the spikes for which one looks at a loss curve.
"""

import dataclasses
import html
import itertools
import json
import math

import numpy as np

POINTS_WIDE = 1000  # most points of a curve in a chart as wide as the page
POINTS_NARROW = 500  # the same in a chart of half that width
BOX_WIDTH, BOX_HEIGHT = 4000, 1000  # the viewBox of the curves; whole numbers in it are finer than a pixel
RIM = 8  # in these units, above and below: else a line along the edge would be cut to half its width
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Axis:
    """A horizontal axis from 0 to `high` (in the units of the records), labelled in units of `divisor`."""

    key: str  # updates, tokens or time
    label: str
    high: float
    divisor: float = 1.0
    whole: bool = False  # ticks at whole numbers only


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line. `x` maps each axis key to positions; these and `values` are all of one length."""

    name: str
    style: str  # a CSS class: raw, train or heldout
    x: dict[str, np.ndarray]
    values: np.ndarray
    markers: bool = False


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
    suffix: str = ""  # follows every number, as in 98.7%
    note: str = ""  # a sentence below the chart


# --- numbers ---


def format_number(value: float, digits: int = 3) -> str:
    """Writes a number to `digits` significant digits: 0.912, 1.2k, 3.4M, 7B, 3×10⁻⁴, −2, nan."""
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    size = abs(float(f"{value:.{digits}g}"))  # rounded first, so that 999.96 becomes 1k and not 1000
    sign = "−" if value < 0 and size else ""
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        return f"{sign}{_trim(mantissa)}×10{str(int(exponent)).translate(SUPERSCRIPT)}"
    thousands = min(math.floor(math.log10(size) + 1e-9) // 3, 4) if size >= 1000 else 0
    scaled = size / 1000**thousands
    decimals = max(digits - 1 - math.floor(math.log10(scaled) + 1e-9), 0)
    return f"{sign}{_trim(f'{scaled:.{decimals}f}')}{['', 'k', 'M', 'B', 'T'][thousands]}"


def format_duration(seconds: float) -> str:
    """Writes a time span with its two largest units: 0.84 s, 48 s, 3 min 48 s, 2 h 05 min, 3 d 4 h."""
    if not math.isfinite(seconds) or seconds < 10:
        return f"{format_number(seconds, 2)} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{minutes} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{days} d {hours % 24} h"


def _trim(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


# --- points ---


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most `limit` values, with the first, the last, and every bucket's lowest and highest.

    A bucket without a finite value keeps one index, so that the line is broken there.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    keep = {0, len(values) - 1}
    edges = np.linspace(1, len(values) - 1, (limit - 2) // 2 + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        bucket = values[start:stop]
        finite = np.flatnonzero(np.isfinite(bucket))
        if finite.size:
            keep |= {
                int(start + finite[np.argmin(bucket[finite])]),
                int(start + finite[np.argmax(bucket[finite])]),
            }
        else:
            keep.add(int(start))
    return np.array(sorted(keep))


def smooth(values: np.ndarray, half_width: int) -> np.ndarray:
    """Centred moving mean over 2 x `half_width` + 1 values; what is not finite is left out and stays a gap.

    The window narrows towards the start, where a loss falls too fast to be averaged, and ends with the curve.
    """
    index = np.arange(len(values))
    half = np.minimum(half_width, index // 2)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan)


# --- axes ---


def make_time_axis(seconds: float) -> Axis:
    """The time axis in the unit that keeps its numbers small."""
    for limit, divisor, label in ((120, 1, "seconds"), (7200, 60, "minutes"), (172800, 3600, "hours")):
        if seconds <= limit:
            return Axis("time", label, seconds, divisor)
    return Axis("time", "days", seconds, 86400)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten in [low, high], about `count` of them at most."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    steps = [m * power for m in (1, 2, 2.5, 5, 10)]
    if whole:
        steps = [s for s in steps if s >= 1 and s == int(s)] or [1.0]
    step = next((s for s in steps if (high - low) / s <= count), steps[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def tick_labels(marks: list[float]) -> list[str]:
    """The marks as text, with as many decimals in each as the finest needs where they are evenly spaced."""
    labels = [format_number(mark, 4) for mark in marks]
    even = len(marks) < 3 or math.isclose(marks[1] - marks[0], marks[-1] - marks[-2], rel_tol=1e-6)
    if not even or any(label[-1] in "kMBT" or "×" in label for label in labels):
        return labels
    decimals = max(len(label.partition(".")[2]) for label in labels)
    return [f"{mark:.{decimals}f}".replace("-", "−") if mark else "0" for mark in marks]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis: even steps in a short range, round numbers in a long one."""
    decades = math.log10(high / low)
    if decades < 0.5:
        return ticks(low, high, 6)
    stride = math.ceil(decades / 6)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 3, 5) if decades < 1.2 else (1, 2, 5) if decades < 2.5 else (1,)
    marks = [float(f"{m}e{e}") for e in exponents if e % stride == 0 for m in factors]
    return [mark for mark in marks if low <= mark <= high]


def domain(
    values: np.ndarray, floor: float | None, ceiling: float | None, clip: bool = False
) -> tuple[float, float]:
    """The range of a linear axis over finite `values`, with a little air where no floor or ceiling is given.

    With `clip`, a largest value more than four times the 99th percentile is left above the axis.
    """
    low, high = float(np.min(values)), float(np.max(values))
    if clip and len(values) >= 20 and high > 4 * (bulk := float(np.quantile(values, 0.99))) > 0:
        high = 1.25 * bulk
    low, high = (low if floor is None else min(low, floor)), (high if ceiling is None else max(high, ceiling))
    if low == high:
        air = abs(low) / 10 or 1.0
        return low - (0 if low == floor else air), high + (0 if high == ceiling else air)
    air = 0.06 * (high - low)
    return low - (0 if low == floor else air), high + (0 if high == ceiling else air)


# --- drawing ---


def draw_chart(chart: Chart, axes: list[Axis]) -> str:
    """The chart as one HTML figure: caption with keys and last values, SVG drawings, notes, hover values."""
    everything = np.concatenate([curve.values for curve in chart.curves])
    finite = everything[np.isfinite(everything)]
    title = f'<h3>{html.escape(chart.title)}</h3><span class="unit">{html.escape(chart.unit)}</span>'
    if not finite.size:
        nothing = '<p class="note">No finite values.</p>'
        return f'<figure class="chart"><figcaption>{title}</figcaption>{nothing}</figure>'
    scales = _scales(chart, finite)
    kept = [_thinned(curve, POINTS_WIDE if chart.wide else POINTS_NARROW) for curve in chart.curves]
    plots = "".join(_plot(chart, kept, axis, scale, span) for scale, span in scales.items() for axis in axes)
    keys = "".join(_key(curve, chart) for curve in chart.curves)
    classes = "chart" + " wide" * chart.wide + "".join(f" has-{name}" for name in scales if name != "linear")
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(chart, scales["linear"][1]))
    return (
        f'<figure class="{classes}"><figcaption>{title}<span class="keys">{keys}</span></figcaption>'
        f'<div class="frame">{plots}</div>{notes}'
        f'<script type="application/json">{_hover_values(chart, kept, axes)}</script></figure>'
    )


def _scales(chart: Chart, finite: np.ndarray) -> dict[str, tuple[float, float]]:
    """The ranges of the vertical axes on offer; the close-up fits what comes after the first quarter."""
    scales = {"linear": domain(finite, chart.floor, chart.ceiling, chart.clip)}
    if chart.scales and finite.min() > 0:
        air = (finite.max() / finite.min()) ** 0.05 if finite.max() > finite.min() else 2.0
        scales["log"] = (finite.min() / air, finite.max() * air)
    late = np.concatenate(
        [c.values[c.x["updates"] > 0.25 * max(c.x["updates"], default=0)] for c in chart.curves]
    )
    late = late[np.isfinite(late)]
    if chart.scales and len(late) > 2:
        scales["close"] = domain(late, None, None)
    return scales


def _thinned(curve: Curve, limit: int) -> Curve:
    """The points that are drawn, each curve thinned by itself."""
    index = thin(curve.values, limit)
    return dataclasses.replace(curve, values=curve.values[index], x={k: x[index] for k, x in curve.x.items()})


def _key(curve: Curve, chart: Chart) -> str:
    last = curve.values[np.isfinite(curve.values)][-1:]
    value = format_number(last[0], 4) + chart.suffix if last.size else "–"
    named = len(chart.curves) > 1 or curve.style == "heldout"
    swatch = f'<i class="swatch {curve.style}"></i>{html.escape(curve.name)} ' if named else ""
    return f'<span class="key">{swatch}<output>{value}</output></span>'


def _plot(chart: Chart, kept: list[Curve], axis: Axis, scale: str, span: tuple[float, float]) -> str:
    """One drawing: grid and labels, then the clipped curves, then what must keep its shape (dots)."""
    bend = math.log10 if scale == "log" else float
    bottom, top = bend(span[0]), bend(span[1])

    def height(value: float) -> float:
        return min(max((top - bend(value)) / (top - bottom), -3.0), 4.0)  # past the edge is past the edge

    y_marks = log_ticks(*span) if scale == "log" else ticks(*span, 6 if chart.wide else 5, chart.whole)
    paths, dots = [], []
    for curve in kept:
        points = [
            (x / axis.high if axis.high else 0.0, height(y) if math.isfinite(y) else math.nan)
            for x, y in zip(curve.x[axis.key].tolist(), curve.values.tolist(), strict=True)
        ]
        paths.append(f'<path class="curve {curve.style}" d="{_path(points)}"/>')
        dots.extend(_dots(points, curve))
    return (
        f'<svg class="plot x-{axis.key} y-{scale}" role="img"'
        f' aria-label="{html.escape(_spoken(chart, axis))}">'
        f"{_grid(axis, y_marks, height, chart)}"
        f'<svg y="{-100 * RIM / BOX_HEIGHT}%" width="100%" height="{100 + 200 * RIM / BOX_HEIGHT}%" '
        f'viewBox="0 {-RIM} {BOX_WIDTH} {BOX_HEIGHT + 2 * RIM}" preserveAspectRatio="none">'
        f"{''.join(paths)}</svg>{''.join(dots)}</svg>"
    )


def _grid(axis: Axis, y_marks: list[float], height, chart: Chart) -> str:
    """Grid lines and tick labels; every second label of the horizontal axis gives way on a narrow screen."""
    parts = []
    for mark, label in zip(y_marks, tick_labels(y_marks), strict=True):
        at = f"{100 * height(mark):.2f}%"
        parts.append(f'<line class="rule" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="y tick" x="-8" y="{at}" dy=".33em">{label}{chart.suffix}</text>')
    high = axis.high / axis.divisor
    x_marks = ticks(0, high, 9 if chart.wide else 5, axis.whole)
    for i, (mark, label) in enumerate(zip(x_marks, tick_labels(x_marks), strict=True)):
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
                f'<circle class="dot {curve.style}" cx="{100 * x:.2f}%" cy="{100 * y:.2f}%" r="3.5"/>'
            )
    return dots


def _spoken(chart: Chart, axis: Axis) -> str:
    """The chart in words, for those who do not see it."""
    sentences = [f"{chart.title} over {axis.key}."]
    for curve in chart.curves:
        values = curve.values[np.isfinite(curve.values)]
        if values.size and curve.style != "raw":
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


def _hover_values(chart: Chart, kept: list[Curve], axes: list[Axis]) -> str:
    """JSON for the read-out: the texts of each curve's drawn points, and where those of the first are."""
    write = {
        "updates": lambda x: f"{x:,.0f}",
        "tokens": lambda x: format_number(x, 4),
        "time": format_duration,
    }
    finite = [np.isfinite(curve.values) for curve in kept]
    at = {axis.key: [write[axis.key](x) for x in kept[0].x[axis.key][finite[0]].tolist()] for axis in axes}
    values = [
        [format_number(v, 4) + chart.suffix for v in curve.values[shown].tolist()]
        for curve, shown in zip(kept, finite, strict=True)
    ]
    return json.dumps({"at": at, "values": values}, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
