"""Claims about reading metrics.jsonl."""

import json
import math

import numpy as np
import pytest

from llmjax.workdir.metrics import column, layer_columns, read_line, read_metrics


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
    metrics = read_metrics(path)
    assert [line["update"] for line in metrics.train] == [1, 2] and metrics.unreadable == 0
    path.write_text('{"kind":\n[1]\n' + path.read_text())
    assert read_metrics(path).unreadable == 2


def test_spelled_values_become_numbers(tmp_path):
    lines = [_train(1, loss="nan"), _train(2, loss="inf"), _train(3, loss="-inf", note="text", flag=True)]
    metrics = read_metrics(_write(tmp_path / "m", lines))
    loss = column(metrics.train, "loss")
    assert math.isnan(loss[0]) and loss[1] == math.inf and loss[2] == -math.inf
    assert "note" not in metrics.train[2] and "flag" not in metrics.train[2]


def test_an_update_written_twice_counts_once_as_the_later_line_says(tmp_path):
    metrics = read_metrics(
        _write(tmp_path / "m", [_train(1), _train(2, loss=9.0), _train(2, loss=4.0), _train(3)])
    )
    assert column(metrics.train, "loss").tolist() == [5, 4, 5]


def test_lists_dicts_and_texts_are_kept_where_they_belong(tmp_path):
    lines = [
        _train(1, reason="noise scale 2 M", host="a", layers=[1]),
        {
            "kind": "statistics",
            "update": 1,
            "gradient_norm": [1, "inf", None],
            "other": {"embedding": {"a": 2}},
        },
        {"kind": "event", "update": 1, "event": "spike", "text": "a spike"},
        {"kind": "weather", "update": 1, "text": "rain"},
    ]
    metrics = read_metrics(_write(tmp_path / "m", lines))
    assert metrics.train[0]["reason"] == "noise scale 2 M" and not {"host", "layers"} & set(metrics.train[0])
    (line,) = metrics.statistics
    assert line["gradient_norm"] == [1.0, math.inf, None] and line["other"] == {"embedding": {"a": 2.0}}
    assert [event["text"] for event in metrics.events] == ["a spike"] and metrics.unreadable == 0


def test_events_stay_in_order_and_one_written_twice_counts_once(tmp_path):
    event = lambda update, name: {"kind": "event", "update": update, "event": name, "text": "x"}  # noqa: E731
    lines = [event(7, "spike"), event(7, "skip"), event(3, "dropped"), event(7, "spike")]
    metrics = read_metrics(_write(tmp_path / "m", lines))
    assert [(e["update"], e["event"]) for e in metrics.events] == [(3, "dropped"), (7, "spike"), (7, "skip")]


def test_layers_are_columns_and_what_is_missing_is_nan():
    lines = [{"a": [1.0, 2.0]}, {"a": [3.0, None]}, {}, {"a": 4.0}]
    np.testing.assert_array_equal(
        layer_columns(lines, "a"), [[1, 2], [3, np.nan], [np.nan, np.nan], [np.nan, np.nan]]
    )
    assert layer_columns([{}], "a").shape == (1, 0)


def test_a_line_is_read_whole_or_not_at_all():
    line = b'{"kind": "statistics", "update": 3, "mlp_rms": [1, "-inf"], "other": {"a": {"b": "nan"}}, "ok": true}'
    read = read_line(line)
    assert read["update"] == 3 and read["mlp_rms"] == [1.0, -math.inf] and math.isnan(read["other"]["a"]["b"])
    assert read["ok"] is None
    assert [read_line(bad) for bad in (line[:-1], b"[3]", b'{"kind": "train"}', b'{"update": "nan"}')] == [
        None
    ] * 4


GARBAGE = {
    "a number of 400 digits": b'{"kind": "train", "update": 1' + b"0" * 400 + b"}",
    "a number of 5,000 digits": b'{"kind": "train", "update": 1' + b"0" * 5000 + b"}",
    "a list": b"[1, 2]",
    "a list as update": b'{"kind": "train", "update": [1]}',
    "a list as kind": b'{"kind": ["train"], "update": 1}',
    "a list as event": b'{"kind": "event", "update": 1, "event": ["spike"], "text": {}}',
    "a text as update": b'{"kind": "train", "update": "one"}',
    "a table as update": b'{"kind": "train", "update": {"a": 1}}',
    "an update that is no number": b'{"kind": "train", "update": NaN}',
    "an endless update": b'{"kind": "train", "update": Infinity}',
    "half an update": b'{"kind": "train", "update": 1.5}',
    "an update below 0": b'{"kind": "train", "update": -1}',
    "a truth as update": b'{"kind": "train", "update": true}',
    "bytes that are no text": b'{"kind": "train", "update": 1, "\xff\xfe": 2}',
    "lists without end": b'{"kind": "train", "update": 1, "loss": ' + b"[" * 100_000,
    "tables without end": b'{"a":' * 100_000,
    "nothing": b"null",
    "zeros of a torn disk": b"\0" * 64,
    "half a line": b'{"kind": "train", "upd',
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_line_that_is_no_record_is_none_and_is_counted(name, tmp_path):
    assert read_line(GARBAGE[name]) is None
    good = json.dumps(_train(1)).encode()
    (tmp_path / "m").write_bytes(
        good + b"\n" + GARBAGE[name] + b"\n" + json.dumps(_train(2)).encode() + b"\n"
    )
    metrics = read_metrics(tmp_path / "m")
    assert [line["update"] for line in metrics.train] == [1, 2] and metrics.unreadable == 1


def test_a_number_beyond_floats_is_infinite():
    digits = "9" * 400
    read = read_line(f'{{"kind": "train", "update": 1, "loss": {digits}, "tokens": -{digits}}}')
    assert (read["loss"], read["tokens"]) == (math.inf, -math.inf)
