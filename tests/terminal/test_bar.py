"""Bars fit the terminal, and what matters most is left out last."""

import pytest
from terminal.screen import screen

from llmjax.terminal.bar import Bar
from llmjax.terminal.progress import Progress

PARTS = ["loss 8.3087", "3.27k tokens/s", "ETA 3 min 48 s"]


@pytest.mark.parametrize("columns, shown", [(120, 3), (80, 3), (50, 2), (40, 2), (30, 1), (26, 1), (24, 1)])
def test_a_narrow_terminal_keeps_the_last_part_and_leaves_out_those_before_it(columns, shown, monkeypatch):
    with screen(monkeypatch, columns) as seen:
        bar = Bar(60, "0/60", stays=True)
        bar.show(60, "60/60", PARTS)
        bar.close()
    last = seen.drawings[-1]
    kept = [part for part in PARTS if part in last]
    assert kept == [*PARTS[: shown - 1], PARTS[-1]] and len(last) <= columns
    assert last.startswith("60/60 ") and ("█" in last) == (columns > 24)


@pytest.mark.parametrize("columns", [40, 80])
def test_a_run_shows_its_remaining_time_whatever_the_width(columns, monkeypatch):
    with screen(monkeypatch, columns) as seen:
        progress = Progress(4096 * 12345, 4096)
        for update in (1, 2):
            values = {"loss": 8.3, "tokens": 4096 * update, "tokens_per_second": 3270.0}
            progress.train(update, values)
        progress.close()
    assert "ETA 4 h" in seen.drawings[-1] and all(len(text) <= columns for text in seen.drawings)


@pytest.mark.parametrize("columns, lines, width", [(40, 0, 40), (0, 24, 80), (0, 0, 80)])
def test_a_terminal_that_knows_half_of_its_size_is_believed_in_that(columns, lines, width, monkeypatch):
    with screen(monkeypatch, columns, lines) as seen:
        bar = Bar(60, "0/60", stays=True)
        bar.show(60, "60/60", PARTS[:2])
        bar.close()
    assert len(seen.drawings[-1]) == width


def test_braces_stand_for_themselves(monkeypatch):
    with screen(monkeypatch, 80) as seen:
        bar = Bar(1, "{a}", ["{b} {bar}"], stays=True)
        bar.close()
    assert seen.drawings[-1].startswith("{a} |") and seen.drawings[-1].endswith("| {b} {bar}")


def test_a_full_bar_is_drawn_however_soon_it_is_full(monkeypatch):
    with screen(monkeypatch, 80) as seen:
        bar = Bar(10, "0", stays=False)
        for done in range(1, 11):
            bar.show(done, str(done), ["of 10"])
        bar.close()
    assert seen.drawings[-1].startswith("10 |")
