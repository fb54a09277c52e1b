"""One drawing of a chart as inline SVG: grid, labels, flags, curves and dots.

Positions are percentages of an SVG element that has no viewBox. The browser therefore stretches the drawing to the
width of the screen, while text and lines keep their size. Only the curves lie in a nested SVG element with a viewBox,
which is stretched without keeping its proportions and cuts off what lies outside.
"""

import html
import math
from collections.abc import Callable

from llmjax.report.chart_axes import Axis, apart, log_ticks, tick_labels, ticks
from llmjax.report.chart_texts import describe
from llmjax.report.charts import Chart, Curve

# The size of the viewBox of the curves. A choice: so large that whole numbers in it are finer than a pixel, which keeps
# the paths short.
BOX_WIDTH, BOX_HEIGHT = 4000, 1000
# A margin of the viewBox above and below, in its units. Without it half the width of a line along the edge would be
# cut off.
RIM = 8
# The heights between which points are drawn, where 0 is the top of the chart and 1 its bottom. What lies outside of the
# chart is cut off anyway, and limits keep the numbers in the paths short.
HIGHEST, LOWEST = -3.0, 4.0


def draw_plot(chart: Chart, curves: list[Curve], axis: Axis, scale: str, span: tuple[float, float]) -> str:
    """The SVG element with `curves` over one horizontal axis.

    Args:
      chart: the chart that the curves belong to.
      curves: its curves, thinned to the points that are drawn.
      axis: the horizontal axis.
      scale: the name of the vertical axis; `log` and `only` are logarithmic.
      span: the lowest and the highest value of the vertical axis.
    """
    is_log = scale in ("log", "only")
    transform = math.log10 if is_log else float
    bottom, top = transform(span[0]), transform(span[1])

    def height(value: float) -> float:
        """Where a value lies between the top (0) and the bottom (1) of the drawing."""
        return min(max((top - transform(value)) / (top - bottom), HIGHEST), LOWEST)

    y_marks = log_ticks(*span) if is_log else ticks(*span, 6 if chart.wide else 5, chart.whole)
    paths, dots = [], []
    for curve in curves:
        points = [
            (x / axis.high if axis.high else 0.0, height(y) if math.isfinite(y) else math.nan)
            for x, y in zip(curve.x[axis.key].tolist(), curve.values.tolist(), strict=True)
        ]
        paths.append(f'<path class="curve {curve.style}"{depth_colour(curve)} d="{_path(points)}"/>')
        dots.extend(_dots(points, curve))
    # Dots lie outside of the nested element, which would stretch them to ellipses.
    return (
        f'<svg class="plot x-{axis.key} y-{scale}" role="img"'
        f' aria-label="{html.escape(describe(chart, axis))}">'
        f"{_grid(axis, y_marks, height, chart)}{_flags(chart, axis)}"
        f'<svg y="{-100 * RIM / BOX_HEIGHT}%" width="100%" height="{100 + 200 * RIM / BOX_HEIGHT}%" '
        f'viewBox="0 {-RIM} {BOX_WIDTH} {BOX_HEIGHT + 2 * RIM}" preserveAspectRatio="none">'
        f"{''.join(paths)}</svg>{''.join(dots)}</svg>"
    )


def depth_colour(curve: Curve) -> str:
    """The style attribute that gives a layer's curve its colour, empty for other curves.

    The style sheet mixes the colour, but it cannot know how deep the layer lies.
    """
    return f' style="--depth:{100 * curve.depth:.0f}%"' if curve.style == "depth" else ""


def _flags(chart: Chart, axis: Axis) -> str:
    """A vertical line with a flag for each event. Events at the same place share one flag."""
    places = {f"{100 * mark.x[axis.key] / axis.high if axis.high else 0:.1f}%" for mark in chart.marks}
    return "".join(
        f'<line class="mark" x1="{at}" x2="{at}" y2="100%"/>'
        f'<svg class="flag" x="{at}" overflow="visible"><path d="M-4.5-7h9L0 1z"/></svg>'
        for at in sorted(places)
    )


def _grid(axis: Axis, y_marks: list[float], height: Callable[[float], float], chart: Chart) -> str:
    """Grid lines, the labels of the ticks, and the name of the horizontal axis."""
    parts = []
    for mark, label in zip(y_marks, tick_labels(y_marks), strict=True):
        at = f"{100 * height(mark):.2f}%"
        parts.append(f'<line class="rule" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="y tick" x="-8" y="{at}" dy=".33em">{label}{chart.suffix}</text>')
    high, count = axis.high / axis.divisor, 9 if chart.wide else 5
    x_marks = ticks(0, high, count, axis.whole)
    # An axis with marks of its own shows as many of them as there is room for.
    labelled = apart(axis.marks, high / (count + 2)) or list(zip(x_marks, tick_labels(x_marks), strict=True))
    for i, (mark, label) in enumerate(labelled):
        at = f"{100 * mark / high if high else 0:.2f}%"
        # The style sheet hides every second label on a narrow screen.
        spare = " spare" * (i % 2)
        parts.append(f'<text class="x tick{spare}" x="{at}" y="100%" dy="1.55em">{label}</text>')
    parts.append('<line class="base" x2="100%" y1="100%" y2="100%"/>')
    parts.append(f'<text class="axis" x="100%" y="100%" dy="2.9em">{axis.label}</text>')
    return "".join(parts)


def _path(points: list[tuple[float, float]]) -> str:
    """The `d` attribute of a path through the points (x, y), each from 0 to 1. NaN as a height makes a gap."""
    # M moves to a point without a line, L draws a line to it.
    parts, pen = [], "M"
    for x, y in points:
        if math.isnan(y):
            pen = "M"
            continue
        parts.append(f"{pen}{x * BOX_WIDTH:.0f},{y * BOX_HEIGHT:.0f}")
        pen = "L"
    return "".join(parts)


def _dots(points: list[tuple[float, float]], curve: Curve) -> list[str]:
    """A dot for every point of a curve with markers. Other curves have dots at points between two gaps only, which no
    line leads to and which would be invisible without a dot."""
    drawn = [math.isfinite(y) for _, y in points]
    dots = []
    for i, (x, y) in enumerate(points):
        isolated = not any(drawn[max(i - 1, 0) : i] + drawn[i + 1 : i + 2])
        if drawn[i] and (curve.markers or isolated) and 0 <= y <= 1:
            place = f'cx="{100 * x:.2f}%" cy="{100 * y:.2f}%"'
            dots.append(f'<circle class="dot {curve.style}"{depth_colour(curve)} {place} r="3.5"/>')
    return dots
