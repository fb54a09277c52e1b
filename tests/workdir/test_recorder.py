"""The record of a run: whole after a crash, continued after a resume, quiet on the terminal."""

import json
import math
import types

import pytest
from event_files import read_events
from test_metrics import GARBAGE
from tiny_run import lines_of

from llmjax.tasks.language_model import LanguageModel
from llmjax.terminal import progress
from llmjax.workdir.recorder import Recorder, truncate

SCORES = LanguageModel.scores


def values(update, **more):
    return {"tokens": 100 * update, "seconds": 0.5 * update, "loss": 1.0 / update, **more}


def record(workdir, first, last, resume_update):
    with Recorder(workdir, resume_update=resume_update, num_tokens=10, tokens_per_update=1) as recorder:
        for update in range(first, last + 1):
            recorder.train(update, values(update))
            if update % 2 == 0:
                recorder.evaluate(update, {"tokens": 100 * update, "loss": 2.0, "perplexity": math.e**2})


def test_a_resumed_record_equals_one_that_never_stopped(tmp_path, capsys):
    record(tmp_path / "whole", 1, 9, 0)
    record(tmp_path / "parts", 1, 7, 0)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "upd')  # the process died in the middle of a line
    record(tmp_path / "parts", 5, 9, 4)
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    assert [line["update"] for line in lines_of(tmp_path / "parts") if line["kind"] == "train"] == [
        *range(1, 10)
    ]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}')
    truncate(path, 2)
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n'
    assert not path.with_suffix(".jsonl.tmp").exists()


def test_lines_are_on_disk_as_soon_as_they_are_recorded(tmp_path):
    recorder = Recorder(tmp_path, resume_update=0, num_tokens=2, tokens_per_update=1)
    recorder.train(1, values(1))
    assert [line["update"] for line in lines_of(tmp_path)] == [1]
    recorder.close()


def test_numbers_that_json_lacks_are_written_as_words(tmp_path, capfd):
    with Recorder(tmp_path, resume_update=0, num_tokens=1, tokens_per_update=1) as recorder:
        recorder.train(1, {"tokens": 1, "loss": math.nan, "grad_norm": math.inf, "low": -math.inf})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"], line["low"]) == ("nan", "inf", "-inf")
    (line,) = lines_of(tmp_path)
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf and line["kind"] == "train"
    assert capfd.readouterr().err == ""


def test_tensorboard_gets_every_number_and_drops_what_a_resume_repeats(tmp_path):
    record(tmp_path, 1, 3, 0)
    record(tmp_path, 3, 4, 2)
    events = read_events(tmp_path)
    scalars = [
        (event.step, value.tag, value.simple_value) for event in events for value in event.summary.value
    ]
    assert (2, "train/loss", 0.5) in scalars and (4, "evaluate/loss", 2.0) in scalars
    # TensorBoard hides what it read at or after the step of a START event.
    assert [event.step for event in events if event.HasField("session_log")] == [1, 3]


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("llmjax.parallel.hosts.is_primary", lambda: False)
    record(tmp_path / "w", 1, 4, 0)
    assert not (tmp_path / "w").exists() and capfd.readouterr() == ("", "")


def test_without_a_terminal_there_are_few_plain_lines(tmp_path, capfd, monkeypatch):
    clock = iter(range(0, 1000, 4))  # four seconds an update
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with Recorder(
        tmp_path, resume_update=0, num_tokens=800, tokens_per_update=100, scores=SCORES
    ) as recorder:
        for update in range(1, 9):
            recorder.train(update, values(update, tokens_per_second=50.0))
        recorder.evaluate(8, {"tokens": 800, "loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.5})
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "update 1/8  loss 1.0000  50 tokens/s  ETA 14 s",
        "update 4/8  loss 0.2500  50 tokens/s  ETA 8 s",
        "update 7/8  loss 0.1429  50 tokens/s  ETA 2 s",
        "update 8/8  loss 0.1250  50 tokens/s  ETA 0 s",
        "update 8/8  held-out loss 2.0000  perplexity 7.3890  bits per byte 1.5000",
    ]


def test_on_a_terminal_evaluations_stand_above_the_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Recorder(
        tmp_path, resume_update=0, num_tokens=200, tokens_per_update=100, scores=SCORES
    ) as recorder:
        recorder.train(1, values(1, tokens_per_second=2e4))
        recorder.evaluate(1, {"tokens": 100, "loss": 2.0})
        recorder.train(2, values(2, tokens_per_second=2e4))
    out, err = capfd.readouterr()
    assert out == "update 1/2  held-out loss 2.0000\n"
    assert "2/2 |" in err and "| loss 0.5000  20k tokens/s  ETA 0 s" in err


def test_lines_that_cannot_be_read_are_kept_aside_and_said_and_stop_no_resume(tmp_path, capsys):
    record(tmp_path / "whole", 1, 9, 0)
    record(tmp_path / "parts", 1, 7, 0)
    path = tmp_path / "parts" / "metrics.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    bad = [line + b"\n" for line in GARBAGE.values()]
    path.write_bytes(b"".join(bad[:3] + good[:4] + bad[3:] + good[4:]) + b'{"kind": "train", "upd')
    capsys.readouterr()
    record(tmp_path / "parts", 5, 9, 4)
    assert (
        f"lines that cannot be read ({len(bad)}) were moved to metrics.unreadable.jsonl"
        in capsys.readouterr().out
    )
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    aside = path.with_name("metrics.unreadable.jsonl")
    assert aside.read_bytes() == b"".join(bad)
    with path.open("ab") as file:
        file.write(b"[3]\n")
    record(tmp_path / "parts", 10, 9, 9)
    assert aside.read_bytes() == b"".join(bad) + b"[3]\n"


def test_a_record_without_damage_has_nothing_aside(tmp_path, capsys):
    record(tmp_path, 1, 3, 0)
    record(tmp_path, 3, 4, 2)
    assert (
        not (tmp_path / "metrics.unreadable.jsonl").exists()
        and "cannot be read" not in capsys.readouterr().out
    )
