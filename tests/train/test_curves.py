"""Claims about reading metrics.jsonl and about what is drawn of it."""

import json
import math

import numpy as np

from llmjax.train import curves


def _write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path


def _train(update, **more):
    return {
        "kind": "train",
        "update": update,
        "tokens": 100 * update,
        "seconds": 2.0 * update,
        "loss": 5.0,
    } | more


def test_a_torn_last_line_is_ignored_and_others_are_counted(tmp_path):
    path = _write(tmp_path / "metrics.jsonl", [_train(1), _train(2)], '{"kind":"train","upd')
    metrics = curves.read_metrics(path)
    assert [line["update"] for line in metrics.train] == [1, 2] and metrics.unreadable == 0
    path.write_text('{"kind":\n[1]\n' + path.read_text())
    assert curves.read_metrics(path).unreadable == 2


def test_spelled_values_become_numbers(tmp_path):
    lines = [_train(1, loss="nan"), _train(2, loss="inf"), _train(3, loss="-inf", note="text", flag=True)]
    metrics = curves.read_metrics(_write(tmp_path / "m", lines))
    loss = curves.column(metrics.train, "loss")
    assert math.isnan(loss[0]) and loss[1] == math.inf and loss[2] == -math.inf
    assert metrics.train[2]["note"] is None and metrics.train[2]["flag"] is None


def test_an_update_written_twice_counts_once_as_the_later_line_says(tmp_path):
    metrics = curves.read_metrics(
        _write(tmp_path / "m", [_train(1), _train(2, loss=9.0), _train(2, loss=4.0), _train(3)])
    )
    assert curves.column(metrics.train, "loss").tolist() == [5, 4, 5]


def test_a_clock_that_restarts_runs_on():
    train = [_train(1, seconds=10.0), _train(2, seconds=20.0), _train(3, seconds=4.0), _train(4, seconds=9.0)]
    x, _, axes = curves.positions(curves.Metrics(train, []))
    assert x["time"].tolist() == [10, 20, 24, 29]
    assert [axis.key for axis in axes] == ["updates", "tokens", "time"]


def test_evaluations_stand_at_the_tokens_and_time_of_their_update():
    evaluate = [{"update": 0.0, "loss": 9.0}, {"update": 2.0, "loss": 4.0, "tokens": 7.0}]
    _, x, _ = curves.positions(curves.Metrics([_train(i) for i in (1, 2, 3)], evaluate))
    assert x["tokens"].tolist() == [0, 200] and x["time"].tolist() == [0, 4]


def test_an_axis_of_which_the_lines_know_nothing_is_left_out():
    train = [{"update": 1.0, "loss": 3.0}, {"update": 2.0, "loss": 2.0, "seconds": 1.0}]
    _, _, axes = curves.positions(curves.Metrics(train, []))
    assert [axis.key for axis in axes] == ["updates"]


def test_unknown_numbers_get_charts_of_their_own_and_texts_do_not(tmp_path):
    lines = [_train(i, grad_norm=1.0, z_loss=0.1 * i, host="a", ok=True) for i in range(1, 5)]
    known, others = curves.measure_charts(curves.read_metrics(_write(tmp_path / "m", lines)))
    assert [chart.title for chart in known] == ["Gradient norm"]
    assert [chart.title for chart in others] == ["z_loss"]


def test_shares_are_shown_in_percent_and_waits_in_milliseconds():
    lines = [_train(i, packing_efficiency=0.98, data_wait=0.003) for i in range(1, 4)]
    packing, wait = curves.measure_charts(curves.Metrics(lines, []))[0]
    np.testing.assert_allclose(packing.curves[0].values, 98.0)
    np.testing.assert_allclose(wait.curves[0].values, 3.0)
    assert packing.suffix == "%" and wait.unit == "ms/update"


def test_loss_chart_has_raw_smoothed_and_held_out_lines():
    train, evaluate = [_train(i) for i in (1, 2, 3)], [{"update": 3.0, "loss": 4.0}]
    styles = lambda chart: [curve.style for curve in chart.curves]  # noqa: E731
    assert styles(curves.loss_chart(curves.Metrics(train, evaluate))) == ["raw", "train", "heldout"]
    assert styles(curves.loss_chart(curves.Metrics([], evaluate))) == ["heldout"]
    assert curves.loss_chart(curves.Metrics([], [])) is None


def test_what_was_not_measured_at_an_update_is_left_out_and_is_no_gap():
    lines = [_train(1), _train(2, tokens_per_second=7.0), _train(3, tokens_per_second=math.nan)]
    (chart,) = curves.measure_charts(curves.Metrics(lines, []))[0]
    assert chart.curves[0].x["updates"].tolist() == [2, 3] and chart.curves[0].x["time"].tolist() == [4, 6]
    assert np.isnan(chart.curves[0].values).tolist() == [False, True]
