"""Claims about the drawing of charts."""

import json
import math
import re

import numpy as np
import pytest

from llmjax.report import chart_axes, chart_drawing, charts


def _chart(values, **settings):
    values = np.asarray(values, dtype=float)
    x = {"updates": np.arange(1.0, len(values) + 1)}
    curve = charts.Curve("a curve", "train", x, values)
    return charts.Chart("A chart", "units", (curve,), **settings), [
        chart_axes.Axis("updates", "updates", len(values), whole=True)
    ]


def _paths(figure):
    return re.findall(r'<path class="curve [a-z]+" d="([^"]*)"', figure)


def test_clipping_leaves_a_lone_spike_above_the_axis_and_says_so():
    values = np.full(400, 1.0)
    values[6] = 300.0
    low, high = chart_axes.domain(values, 0, None, clip=True)
    assert low == 0 and high < 2
    figure = chart_drawing.draw_chart(*_chart(values, floor=0, clip=True))
    assert "1 of 400 values lie above the axis, the highest 300 at update 7." in figure


def test_points_lie_where_their_values_are():
    chart, axes = _chart([0.0, 10.0, 5.0, 2.5], floor=0, ceiling=10)
    (path,) = _paths(chart_drawing.draw_chart(chart, axes))
    assert path == "M1000,1000L2000,0L3000,500L4000,750"


def test_the_line_breaks_at_values_that_are_not_finite_and_the_note_names_them():
    chart, axes = _chart([1.0, 2.0, math.nan, 3.0, math.inf, 2.0])
    figure = chart_drawing.draw_chart(chart, axes)
    (path,) = _paths(figure)
    assert path.count("M") == 3 and len(re.findall("[ML]", path)) == 4
    assert "Not finite at 2 of 6 updates (3, 5)." in figure
    assert figure.count("<circle") == 2  # points 4 and 6 have no neighbour to draw a line to


def test_a_single_point_is_a_dot_and_no_point_is_a_sentence():
    assert chart_drawing.draw_chart(*_chart([2.0])).count("<circle") == 1
    assert "No finite values" in chart_drawing.draw_chart(*_chart([math.nan]))


def test_each_drawn_point_has_a_text_for_the_read_out():
    chart, axes = _chart(np.random.default_rng(1).normal(size=5000))
    figure = chart_drawing.draw_chart(chart, axes)
    texts = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])
    (path,) = _paths(figure)
    points = len(re.findall("[ML]", path))
    assert 400 < points <= chart_drawing.POINTS_NARROW
    assert len(texts["values"][0]) == len(texts["at"]["updates"]) == points
    assert texts["at"]["updates"][-1] == "5,000"


def test_a_logarithmic_axis_is_offered_for_positive_values_only():
    assert "y-log" in chart_drawing.draw_chart(*_chart([1.0, 2.0, 3.0], scales=True))
    assert "y-log" not in chart_drawing.draw_chart(*_chart([0.0, 2.0, 3.0], scales=True))
    assert "y-log" not in chart_drawing.draw_chart(*_chart([1.0, 2.0, 3.0]))


def test_the_close_up_fits_the_later_part():
    values = np.concatenate([np.linspace(100, 2, 20), np.full(80, 2.0), [1.0]])
    figure = chart_drawing.draw_chart(*_chart(values, scales=True))
    close = re.search(r'y-close".*?d="([^"]*)"', figure)[1]
    heights = [int(y) for y in re.findall(r",(-?\d+)", close)]
    assert heights[0] < 0 and all(0 <= y <= 1000 for y in heights[25:])


def test_titles_are_escaped():
    chart, axes = _chart([1.0, 2.0])
    chart = charts.Chart("<b>&", '"unit"', chart.curves)
    figure = chart_drawing.draw_chart(chart, axes)
    assert "<b>" not in figure and "&lt;b&gt;&amp;" in figure


def test_a_logarithmic_chart_has_no_other_axis_and_names_what_it_cannot_draw():
    chart, axes = _chart([1.0, 10.0, 0.0, 100.0, -1.0, math.inf], log=True)
    figure = chart_drawing.draw_chart(chart, axes)
    assert figure.count('class="plot') == 1 and "y-only" in figure
    (path,) = _paths(figure)
    heights = [float(y) for y in re.findall(r",(-?[\d.]+)", path)]
    assert len(heights) == 3 and heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=2)
    assert "Not drawn, because not finite or not above 0: a curve (update 3, 5, 6)." in figure
    assert "No finite values" in chart_drawing.draw_chart(*_chart([0.0, -1.0], log=True))


def test_a_curve_without_a_key_has_neither_caption_nor_read_out():
    chart, axes = _chart([1.0, 2.0])
    first = chart.curves[0]
    many = tuple(
        charts.Curve(f"layer {i}", "depth", first.x, first.values + i, depth=i / 2, keyed=i != 1)
        for i in range(3)
    )
    figure = chart_drawing.draw_chart(charts.Chart("Layers", "", many), axes)
    assert re.findall(r'data-curve="(\d)"', figure) == ["0", "2"]
    values = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])["values"]
    assert [len(texts) for texts in values] == [2, 0, 2]
    assert re.findall(r'path class="curve depth" style="--depth:(\d+)%"', figure) == ["0", "50", "100"]


def test_marks_stand_at_their_place_once_and_are_named_in_the_read_out():
    chart, axes = _chart(np.linspace(2, 1, 10))
    marks = tuple(
        charts.Mark(name, {"updates": at}) for name, at in (("spike", 5.0), ("skip", 5.0), ("<x>", 8.0))
    )
    figure = chart_drawing.draw_chart(charts.Chart("Loss", "", chart.curves, marks=marks), axes)
    assert re.findall(r'<line class="mark" x1="([\d.]+)%"', figure) == ["50.0", "80.0"]
    texts = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])["at"][
        "updates"
    ]
    assert texts[4] == "5 · spike, skip" and texts[7] == "8 · <x>" and texts[0] == "1"
    assert "<x>" not in figure
