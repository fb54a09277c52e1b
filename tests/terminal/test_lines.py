"""What a person reads outside the training loop."""

import io
import sys

import pytest

from llmjax.parallel import hosts
from llmjax.terminal.lines import StageProgress, format_table, indent, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_is_aligned():
    lines = format_table({"a": "one", "longer": "two"}).split("\n")
    assert lines == ["  a       one", "  longer  two"]
    assert format_table({}) == ""


def test_every_line_of_a_text_is_marked_as_quoted():
    assert indent("a\n\n  b") == "  | a\n  | \n  |   b"


def test_one_process_speaks_for_all(capsys, monkeypatch):
    say("first")
    monkeypatch.setattr(hosts, "is_primary", lambda: False)
    say("second")
    assert capsys.readouterr().out == "first\n"


def test_a_stage_has_a_bar_on_a_terminal_that_leaves_nothing_behind(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with StageProgress() as progress:
        progress("reading", 0, 1000)
        progress("reading", 1000, 1000)
        progress("writing", 10, 50)
    shown = terminal.getvalue()
    assert "reading   0% |" in shown and "| 0 B of 1 kB" in shown and "writing" in shown
    assert not shown.split("\r")[-1].strip()


@pytest.mark.parametrize("is_terminal, is_primary", [(False, True), (True, False)])
def test_a_log_file_and_other_processes_get_no_bar(is_terminal, is_primary, monkeypatch):
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(hosts, "is_primary", lambda: is_primary)
    with StageProgress() as progress:
        progress("reading", 10, 1000)
    assert stream.getvalue() == ""
