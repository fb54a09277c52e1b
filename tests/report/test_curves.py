"""Claims about what is drawn of metrics.jsonl."""

import json
import math

import numpy as np

from llmjax.report import curves
from llmjax.workdir.metrics import Metrics, read_metrics


def _write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path


def _train(update, **more):
    return {
        "kind": "train",
        "update": float(update),
        "tokens": 100.0 * update,
        "seconds": 2.0 * update,
        "loss": 5.0,
    } | more


def test_a_clock_that_restarts_runs_on():
    train = [_train(1, seconds=10.0), _train(2, seconds=20.0), _train(3, seconds=4.0), _train(4, seconds=9.0)]
    x = curves.positions(Metrics(train, []))
    assert x.train["time"].tolist() == [10, 20, 24, 29]
    assert [axis.key for axis in x.axes] == ["updates", "tokens", "time"]


def test_evaluations_stand_at_the_tokens_and_time_of_their_update():
    evaluate = [{"update": 0.0, "loss": 9.0}, {"update": 2.0, "loss": 4.0, "tokens": 7.0}]
    x = curves.positions(Metrics([_train(i) for i in (1, 2, 3)], evaluate)).evaluate
    assert x["tokens"].tolist() == [0, 200] and x["time"].tolist() == [0, 4]


def test_an_axis_of_which_the_lines_know_nothing_is_left_out():
    train = [{"update": 1.0, "loss": 3.0}, {"update": 2.0, "loss": 2.0, "seconds": 1.0}]
    assert [axis.key for axis in curves.positions(Metrics(train, [])).axes] == ["updates"]


def test_unknown_numbers_get_charts_of_their_own_and_texts_do_not(tmp_path):
    lines = [_train(i, grad_norm=1.0, z_loss=0.1 * i, host="a", ok=True) for i in range(1, 5)]
    known, others = curves.measure_charts(read_metrics(_write(tmp_path / "m", lines)))
    assert [chart.title for chart in known] == ["Gradient norm"]
    assert [chart.title for chart in others] == ["z_loss"]


def test_shares_are_shown_in_percent_and_waits_in_milliseconds():
    lines = [_train(i, packing_efficiency=0.98, data_wait=0.003) for i in range(1, 4)]
    packing, wait = curves.measure_charts(Metrics(lines, []))[0]
    np.testing.assert_allclose(packing.curves[0].values, 98.0)
    np.testing.assert_allclose(wait.curves[0].values, 3.0)
    assert packing.suffix == "%" and wait.unit == "ms/update"


def test_loss_chart_has_raw_smoothed_and_held_out_lines():
    train, evaluate = [_train(i) for i in (1, 2, 3)], [{"update": 3.0, "loss": 4.0}]
    styles = lambda chart: [curve.style for curve in chart.curves]  # noqa: E731
    assert styles(curves.loss_chart(Metrics(train, evaluate))) == ["raw", "train", "heldout"]
    assert styles(curves.loss_chart(Metrics([], evaluate))) == ["heldout"]
    assert curves.loss_chart(Metrics([], [])) is None


def test_what_was_not_measured_at_an_update_is_left_out_and_is_no_gap():
    lines = [_train(1), _train(2, tokens_per_second=7.0), _train(3, tokens_per_second=math.nan)]
    (chart,) = curves.measure_charts(Metrics(lines, []))[0]
    assert chart.curves[0].x["updates"].tolist() == [2, 3] and chart.curves[0].x["time"].tolist() == [4, 6]
    assert np.isnan(chart.curves[0].values).tolist() == [False, True]


def test_the_batch_is_drawn_with_its_noise_where_it_varies_or_noise_was_measured():
    steps = [4.0, 4.0, 8.0, 8.0]
    tokens = [40.0, 80.0, 160.0, 240.0]
    lines = [_train(i + 1, accumulation_steps=k, tokens=t) for i, (k, t) in enumerate(zip(steps, tokens))]
    known, others = curves.measure_charts(Metrics(lines, []))
    assert [chart.title for chart in known] == ["Tokens per update"] and not others
    assert known[0].curves[0].values.tolist() == [40, 40, 80, 80] and known[0].log
    assert known[0].note == "An update has 4 to 8 micro-steps."
    constant = [_train(i, accumulation_steps=4.0) for i in (1, 2, 3)]
    assert curves.batch_chart(Metrics(constant, [])) is None
    measured = [constant[0], constant[1] | {"noise_scale": 500.0}, constant[2] | {"noise_scale": 600.0}]
    batch, noise = curves.batch_chart(Metrics(measured, [])).curves
    assert batch.values.tolist() == [100, 100, 100]
    assert noise.values.tolist() == [500, 600] and noise.x["tokens"].tolist() == [200, 300]


def test_the_length_of_sequences_is_drawn_where_it_changes():
    lines = [_train(i, seq_len=8.0 if i < 3 else 32.0) for i in (1, 2, 3)]
    (chart,), others = curves.measure_charts(Metrics(lines, []))
    assert (chart.title, others) == ("Sequence length", [])
    assert chart.curves[0].values.tolist() == [8, 8, 32]
    assert curves.measure_charts(Metrics(lines[:2], [])) == ([], [])


def test_tokens_per_update_are_right_where_lines_are_missing():
    lines = [_train(1, accumulation_steps=2.0), _train(4, accumulation_steps=3.0)]
    assert curves.batch_chart(Metrics(lines, [])).curves[0].values.tolist() == [100, 100]


def test_changes_of_the_batch_come_with_the_reason_of_their_line():
    lines = [
        _train(1, accumulation_steps=4.0, reason="a"),
        _train(2, accumulation_steps=4.0, reason="b"),
        _train(3, accumulation_steps=8.0, reason="c"),
        _train(4),
        _train(5, accumulation_steps=6.0),
    ]
    assert curves.batch_changes(Metrics(lines, [])) == [(3, 4, 8, "c"), (5, 8, 6, "")]


def _statistics(update, layers, **more):
    values = [0.1 * (i + 1) * update for i in range(layers)]
    return {"update": float(update), "gradient_norm": values, "residual_rms": values} | more


def test_every_layer_is_a_line_coloured_by_depth_with_the_other_blocks_beside():
    other = {"embedding": {"gradient_norm": 2.0}, "final_norm": {"gradient_norm": 3.0, "odd": "text"}}
    lines = [_statistics(i, 3, other=other) for i in (2, 4)]
    shown, more = curves.layer_charts(Metrics([_train(i) for i in range(1, 6)], [], lines))
    gradient, residual = shown
    assert not more and gradient.log and gradient.tall
    assert [c.name for c in gradient.curves] == ["layer 1", "layer 2", "layer 3", "embedding", "final norm"]
    assert [c.keyed for c in gradient.curves] == [True, False, True, True, True]
    assert [c.depth for c in gradient.curves[:3]] == [0, 0.5, 1] and len(residual.curves) == 3
    np.testing.assert_allclose(gradient.curves[2].values, [0.6, 1.2])
    assert gradient.curves[0].x["tokens"].tolist() == [200, 400]
    assert gradient.curves[4].values.tolist() == [3, 3]


def test_of_very_many_layers_some_are_drawn_the_first_and_the_last_among_them():
    (chart, _), _ = curves.layer_charts(Metrics([], [], [_statistics(1, 100)]))
    assert len(chart.curves) == curves.LAYERS_DRAWN and chart.note == "32 of 100 layers are drawn."
    assert (chart.curves[0].name, chart.curves[-1].name) == ("layer 1", "layer 100")


def test_statistics_that_are_not_there_have_no_charts():
    assert curves.layer_charts(Metrics([_train(1)], [])) == ([], [])
    assert curves.layer_charts(Metrics([], [], [{"update": 1.0, "gradient_norm": "no"}])) == ([], [])


def test_events_are_marks_on_the_loss_that_stay_within_the_run():
    events = [{"update": 2.0, "event": "spike"}, {"update": 9.0, "event": "rewind"}]
    chart = curves.loss_chart(Metrics([_train(i) for i in (1, 2, 3)], [], events=events))
    assert [mark.name for mark in chart.marks] == ["spike", "rewind"]
    assert [mark.x["tokens"] for mark in chart.marks] == [200, 300]
    assert [mark.x["updates"] for mark in chart.marks] == [2, 3]
    assert "Flags mark events" in chart.note
