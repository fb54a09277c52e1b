"""Claims about the numbers, the thinning and the drawing of charts."""

import json
import math
import re

import numpy as np
import pytest

from llmjax.train import charts


def _chart(values, **settings):
    values = np.asarray(values, dtype=float)
    x = {"updates": np.arange(1.0, len(values) + 1)}
    curve = charts.Curve("a curve", "train", x, values)
    return charts.Chart("A chart", "units", (curve,), **settings), [
        charts.Axis("updates", "updates", len(values), whole=True)
    ]


def _paths(figure):
    return re.findall(r'<path class="curve [a-z]+" d="([^"]*)"', figure)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (3.14159, "3.14"), (1234, "1.23k"), (1200, "1.2k"), (3_400_000, "3.4M"),
     (7e9, "7B"), (1.5e13, "15T"), (999.96, "1k"), (999_999, "1M"), (3e-4, "3×10⁻⁴"), (9.999e-4, "0.001"),
     (-2.5, "−2.5"), (100, "100"), (1e20, "1×10²⁰"), (math.nan, "nan"), (-math.inf, "−inf")],
)  # fmt: skip
def test_numbers_are_short_and_keep_three_digits(value, text):
    assert charts.format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.84, "0.84 s"), (48, "48 s"), (59.7, "1 min 00 s"), (228, "3 min 48 s"),
     (7500, "2 h 05 min"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_durations_show_their_two_largest_units(seconds, text):
    assert charts.format_duration(seconds) == text


def test_thinning_keeps_first_last_and_every_extreme():
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345], values[31_007] = 99.0, -99.0
    index = charts.thin(values, 1000)
    assert len(index) <= 1000 and (np.diff(index) > 0).all()
    assert {0, 12_345, 31_007, 49_999} <= set(index.tolist())
    # The highest kept value of any long stretch is the highest there is, not only that of the whole curve.
    for start in range(0, 50_000, 5000):
        kept = index[(index >= start) & (index < start + 5000)]
        inner = values[kept[0] : kept[-1] + 1]
        assert values[kept].max() == inner.max() and values[kept].min() == inner.min()


def test_thinning_leaves_short_curves_alone_and_keeps_a_gap():
    assert charts.thin(np.arange(7.0), 1000).tolist() == list(range(7))
    values = np.ones(10_000)
    values[4000:5000] = np.nan
    assert np.isnan(values[charts.thin(values, 100)]).any()


def test_smoothing_is_the_centred_mean_and_leaves_out_what_is_not_finite():
    values = np.array([9.0, 5.0, 4.0, np.nan, 3.0, 2.0, 1.0, 0.0])
    smoothed = charts.smooth(values, 2)
    assert smoothed[0] == 9.0  # no average over the first steep fall
    assert math.isnan(smoothed[3])
    np.testing.assert_allclose(smoothed[5], (3 + 2 + 1 + 0) / 4)
    np.testing.assert_allclose(smoothed[7], (2 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0, 400, 9), (1.81, 8.9, 6), (0, 6.55e6, 5), (-3, 2, 6), (2.04, 2.07, 6)]
)
def test_ticks_are_round_few_and_inside(low, high, count):
    marks = charts.ticks(low, high, count)
    assert 2 <= len(marks) <= count + 1 and low <= marks[0] and marks[-1] <= high
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5)


def test_ticks_of_counts_are_whole():
    assert charts.ticks(0, 3.2, 9, whole=True) == [0, 1, 2, 3]


def test_tick_labels_have_equal_decimals():
    assert charts.tick_labels([1.8, 2.0, 2.2]) == ["1.8", "2.0", "2.2"]
    assert charts.tick_labels([0, 0.5, 1.0]) == ["0", "0.5", "1.0"]
    assert charts.tick_labels([0, 500, 1000]) == ["0", "500", "1k"]


def test_log_ticks_stay_few_over_any_range():
    assert charts.log_ticks(0.4, 3.2) == [0.5, 1, 2, 3]
    assert charts.log_ticks(1.9, 2.3) == pytest.approx([1.9, 2.0, 2.1, 2.2, 2.3])
    assert len(charts.log_ticks(1e-12, 1e12)) <= 7


def test_clipping_leaves_a_lone_spike_above_the_axis_and_says_so():
    values = np.full(400, 1.0)
    values[6] = 300.0
    low, high = charts.domain(values, 0, None, clip=True)
    assert low == 0 and high < 2
    figure = charts.draw_chart(*_chart(values, floor=0, clip=True))
    assert "1 of 400 values lie above the axis, the highest 300 at update 7." in figure


def test_a_constant_curve_has_an_axis_with_room():
    for value in (0.0, 4.0, -3.0):
        low, high = charts.domain(np.full(5, value), None, None)
        assert low < value < high


def test_points_lie_where_their_values_are():
    chart, axes = _chart([0.0, 10.0, 5.0, 2.5], floor=0, ceiling=10)
    (path,) = _paths(charts.draw_chart(chart, axes))
    assert path == "M1000,1000L2000,0L3000,500L4000,750"


def test_the_line_breaks_at_values_that_are_not_finite_and_the_note_names_them():
    chart, axes = _chart([1.0, 2.0, math.nan, 3.0, math.inf, 2.0])
    figure = charts.draw_chart(chart, axes)
    (path,) = _paths(figure)
    assert path.count("M") == 3 and len(re.findall("[ML]", path)) == 4
    assert "Not finite at 2 of 6 updates (3, 5)." in figure
    assert figure.count("<circle") == 2  # points 4 and 6 have no neighbour to draw a line to


def test_a_single_point_is_a_dot_and_no_point_is_a_sentence():
    assert charts.draw_chart(*_chart([2.0])).count("<circle") == 1
    assert "No finite values" in charts.draw_chart(*_chart([math.nan]))


def test_each_drawn_point_has_a_text_for_the_read_out():
    chart, axes = _chart(np.random.default_rng(1).normal(size=5000))
    figure = charts.draw_chart(chart, axes)
    texts = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])
    (path,) = _paths(figure)
    points = len(re.findall("[ML]", path))
    assert 400 < points <= charts.POINTS_NARROW
    assert len(texts["values"][0]) == len(texts["at"]["updates"]) == points
    assert texts["at"]["updates"][-1] == "5,000"


def test_a_logarithmic_axis_is_offered_for_positive_values_only():
    assert "y-log" in charts.draw_chart(*_chart([1.0, 2.0, 3.0], scales=True))
    assert "y-log" not in charts.draw_chart(*_chart([0.0, 2.0, 3.0], scales=True))
    assert "y-log" not in charts.draw_chart(*_chart([1.0, 2.0, 3.0]))


def test_the_close_up_fits_the_later_part():
    values = np.concatenate([np.linspace(100, 2, 20), np.full(80, 2.0), [1.0]])
    figure = charts.draw_chart(*_chart(values, scales=True))
    close = re.search(r'y-close".*?d="([^"]*)"', figure)[1]
    heights = [int(y) for y in re.findall(r",(-?\d+)", close)]
    assert heights[0] < 0 and all(0 <= y <= 1000 for y in heights[25:])


def test_titles_are_escaped():
    chart, axes = _chart([1.0, 2.0])
    chart = charts.Chart("<b>&", '"unit"', chart.curves)
    figure = charts.draw_chart(chart, axes)
    assert "<b>" not in figure and "&lt;b&gt;&amp;" in figure
