"""What a person reads outside the training loop."""

from llmjax.parallel import hosts
from llmjax.terminal.lines import format_table, indent, say


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
