"""Claims about the numbers, the thinning, the ranges and the ticks of chart_axes."""

import math

import numpy as np
import pytest

from llmjax.report import chart_axes


def test_thinning_keeps_first_last_and_every_extreme():
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345], values[31_007] = 99.0, -99.0
    index = chart_axes.thin(values, 1000)
    assert len(index) <= 1000 and (np.diff(index) > 0).all()
    assert {0, 12_345, 31_007, 49_999} <= set(index.tolist())
    # The highest kept value of any long stretch is the highest there is, not only that of the whole curve.
    for start in range(0, 50_000, 5000):
        kept = index[(index >= start) & (index < start + 5000)]
        inner = values[kept[0] : kept[-1] + 1]
        assert values[kept].max() == inner.max() and values[kept].min() == inner.min()


def test_thinning_leaves_short_curves_alone_and_keeps_a_gap():
    assert chart_axes.thin(np.arange(7.0), 1000).tolist() == list(range(7))
    values = np.ones(10_000)
    values[4000:5000] = np.nan
    assert np.isnan(values[chart_axes.thin(values, 100)]).any()


def test_smoothing_is_the_centred_mean_and_leaves_out_what_is_not_finite():
    values = np.array([9.0, 5.0, 4.0, np.nan, 3.0, 2.0, 1.0, 0.0])
    smoothed = chart_axes.smooth(values, 2)
    assert smoothed[0] == 9.0  # no average over the first steep fall
    assert math.isnan(smoothed[3])
    np.testing.assert_allclose(smoothed[5], (3 + 2 + 1 + 0) / 4)
    np.testing.assert_allclose(smoothed[7], (2 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0, 400, 9), (1.81, 8.9, 6), (0, 6.55e6, 5), (-3, 2, 6), (2.04, 2.07, 6)]
)
def test_ticks_are_round_few_and_inside(low, high, count):
    marks = chart_axes.ticks(low, high, count)
    assert 2 <= len(marks) <= count + 1 and low <= marks[0] and marks[-1] <= high
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5)


def test_ticks_of_counts_are_whole():
    assert chart_axes.ticks(0, 3.2, 9, whole=True) == [0, 1, 2, 3]


def test_tick_labels_have_equal_decimals():
    assert chart_axes.tick_labels([1.8, 2.0, 2.2]) == ["1.8", "2.0", "2.2"]
    assert chart_axes.tick_labels([0, 0.5, 1.0]) == ["0", "0.5", "1.0"]
    assert chart_axes.tick_labels([0, 500, 1000]) == ["0", "500", "1k"]


def test_log_ticks_stay_few_over_any_range():
    assert chart_axes.log_ticks(0.4, 3.2) == [0.5, 1, 2, 3]
    assert chart_axes.log_ticks(1.9, 2.3) == pytest.approx([1.9, 2.0, 2.1, 2.2, 2.3])
    assert len(chart_axes.log_ticks(1e-12, 1e12)) <= 7


def test_a_constant_curve_has_an_axis_with_room():
    for value in (0.0, 4.0, -3.0):
        low, high = chart_axes.domain(np.full(5, value), None, None)
        assert low < value < high


def test_labels_keep_their_distance():
    marks = [(0.0, "1"), (4.0, "16"), (5.0, "32"), (6.0, "64"), (7.0, "128"), (8.0, "256")]
    assert [label for _, label in chart_axes.apart(marks, 2.0)] == ["1", "16", "64", "256"]
    assert chart_axes.apart(marks, 0.5) == marks and chart_axes.apart((), 1.0) == []
