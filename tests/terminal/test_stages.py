"""Whatever takes seconds is named: on a terminal by a line that vanishes, elsewhere by plain lines."""

import io
import re
import sys
import time

import pytest
from terminal.screen import screen

from llmjax.parallel import hosts
from llmjax.terminal import stages
from llmjax.terminal.progress import Progress
from llmjax.terminal.stages import StageProgress, working


@pytest.fixture
def impatient(monkeypatch):
    """Seconds become hundredths."""
    for name, value in {"QUIET_SECONDS": 0.03, "PLAIN_SECONDS": 0.1, "TICK": 0.01}.items():
        monkeypatch.setattr(stages, name, value)


@pytest.mark.parametrize("columns", [40, 80])
def test_a_stage_has_a_bar_on_a_terminal_that_leaves_nothing_behind(columns, monkeypatch):
    with screen(monkeypatch, columns) as seen, StageProgress() as progress:
        progress("reading", 0, 1000)
        progress("reading", 1000, 1000)
        progress("tokenizing", 10, 50)
    shown = "\n".join(seen.drawings)
    assert "reading   0% |" in shown and "0 B of 1 kB" in shown and "reading 100%" in shown
    assert "tokenizing  20%" in shown
    assert seen.last == "" and all(len(text) <= columns for text in seen.drawings)


@pytest.mark.parametrize("columns, amount", [(40, False), (80, True)])
def test_a_stage_shows_its_remaining_time_whatever_the_width(columns, amount, monkeypatch):
    with screen(monkeypatch, columns) as seen:
        monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
        progress = StageProgress()
        progress("reading the text", 0, 1000)
        # tqdm itself draws at most ten times a second.
        time.sleep(0.2)
        monkeypatch.setattr(time, "monotonic", lambda: 1060.0)
        progress("reading the text", 400, 1000)
        progress.__exit__()
    assert any("40%" in text and "ETA 1 min 30 s" in text for text in seen.drawings)
    assert ("400 B of 1 kB" in seen.drawings[-1]) == amount


def test_a_stage_of_unknown_length_counts_its_seconds(impatient, monkeypatch):
    with screen(monkeypatch, 40) as seen, working("compiling the update"):
        time.sleep(1.1)
    assert seen.drawings[0] == "compiling the update  0 s" and seen.drawings[-1].endswith("  1 s")
    assert seen.last == ""


def test_a_stage_stands_below_the_bar_of_a_run(monkeypatch):
    with screen(monkeypatch, 60) as seen:
        progress = Progress(60, 1)
        with working("evaluating"):
            progress.train(1, {"loss": 8.3, "tokens": 1})
        progress.close()
    drawn = "\n".join(seen.drawings)
    assert drawn.index("0/60") < drawn.index("evaluating") and "1/60 |" in seen.drawings[-1]


def test_a_log_names_a_long_stage_now_and_then_and_a_short_one_never(impatient, monkeypatch, capsys):
    with StageProgress() as progress:
        progress("listing")
        progress("tokenizing", 0, 1000)
        progress("tokenizing", 500, 1000)
        time.sleep(0.25)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert 1 <= len(lines) <= 4 and err == ""
    assert all(re.fullmatch(r"tokenizing  50%  500 B of 1 kB", line) for line in lines)


def test_plain_output_has_no_control_characters(impatient, capsys):
    progress = Progress(20, 1)
    with working("compiling the update"):
        time.sleep(0.1)
    progress.train(1, {"loss": 8.3, "tokens": 1, "tokens_per_second": 1.0})
    progress.close()
    out, err = capsys.readouterr()
    assert "compiling the update  0 s" in out and "update 1/20  loss 8.3000" in out and err == ""
    assert re.fullmatch(r"[\n -~]*", out)


def test_a_stage_that_reports_often_is_drawn_now_and_then(monkeypatch):
    began = time.monotonic()
    with screen(monkeypatch, 80) as seen, StageProgress() as progress:
        for done in range(2001):
            progress("looking for changes", done, 2000)
    assert len(seen.drawings) <= 5 + 2 * (time.monotonic() - began) / stages.REDRAW
    assert any("100%" in text for text in seen.drawings)


def test_other_processes_say_nothing(impatient, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(hosts, "is_primary", lambda: False)
    with StageProgress() as progress:
        progress("reading", 10, 1000)
        time.sleep(0.1)
    assert terminal.getvalue() == ""


def test_a_stage_ends_with_an_error_in_it(impatient, capsys):
    with pytest.raises(ValueError), working("compiling"):
        raise ValueError
    time.sleep(0.1)
    assert capsys.readouterr().out == ""
