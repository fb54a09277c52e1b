"""A terminal is shown what a text holds, and obeys nothing in it; files and pipes get the text as it is."""

import io
import pathlib
import re
import sys

import pytest

import llmjax
from llmjax import main
from llmjax.escapes import complain, one_line, printable, show
from llmjax.terminal.lines import indent, say
from llmjax.terminal.progress import Progress

CONTROL_CHARACTERS = {
    "bell": "\x07",
    "backspace": "\x08",
    "carriage return": "\r",
    "vertical tab": "\x0b",
    "clear the screen": "\x1b[2J",
    "title of the window": "\x1b]0;title\x07",
    "delete": "\x7f",
    "C1 introducer": "\x9b2J",
    "next line": "\x85",
    "override to the left": "\u202e",
    "isolate": "\u2066",
    "mark to the left": "\u200f",
    "Arabic mark": "\u061c",
    "line separator": "\u2028",
    "byte that is not UTF-8": "\udcff",
}
HARMLESS = "a\tb\nc é 模型 سلام 👩\u200d💻 \u00ad \\x1b"


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def test_what_a_terminal_obeys_is_an_escape_and_nothing_else_is():
    for text in CONTROL_CHARACTERS.values():
        shown = printable(f"a{text}b")
        assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")
    assert printable("\x1b\x9b\u202e\udcff") == r"\x1b\x9b\u202e\udcff"
    assert printable(HARMLESS) == HARMLESS


def a_progress_line(text):
    Progress(10, 1).say(text)


# Where text of a user, of files or of a model is printed.
PRINTERS = {
    "say": say,
    "quoted": lambda text: say(indent(text)),
    "stream": lambda text: show(text, end=""),
    "progress": a_progress_line,
    "complaint": complain,
}


@pytest.mark.parametrize("name", PRINTERS)
def test_every_printer_escapes_on_a_terminal_and_nowhere_else(name, monkeypatch):
    text = "a" + "".join(text for text in CONTROL_CHARACTERS.values() if text != "\udcff") + "b"
    text = one_line(text) if name == "complaint" else text
    for is_terminal in (True, False):
        streams = Stream(is_terminal), Stream(False)
        out, err = reversed(streams) if name == "complaint" else streams
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        PRINTERS[name](text)
        written = streams[0].getvalue()
        assert (printable(text) in written) == is_terminal and (text in written) != is_terminal


def test_an_error_is_one_line_that_can_be_read(capsys, monkeypatch):
    assert one_line("a\r\nb") == r"a\r\nb" and one_line("a b " * 500) == "a b " * 500
    assert len(one_line("x" * 10**6)) < 400
    for value in ("\x1b[2J", "a\nb", "x" * 5000, "\udcff"):
        assert main.main(["llmjax", "--config=nowhere.py", f"--config.seed={value}"]) == 2
        assert main.main(["llmjax", f"--config={value[:80]}"]) == 2
        for line in capsys.readouterr().err.splitlines():
            assert line.startswith("llmjax: ") and len(line) < 700
    terminal = Stream(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main.main(["llmjax", "--config=\x1b[2J"]) == 2
    assert "\x1b" not in terminal.getvalue() and r"\x1b[2J" in terminal.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_cannot_express_is_an_escape(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show("模 \udcff é", file=stream)
    text = raw.getvalue().decode(encoding)
    assert "\\udcff" in text and text.endswith("\n") and not stream.closed


def files_with(pattern):
    """Which files of the package hold the regular expression."""
    package = pathlib.Path(llmjax.__file__).parent
    files = package.rglob("*.py")
    return {str(x.relative_to(package)) for x in files if re.search(pattern, x.read_text(encoding="utf-8"))}


def test_nothing_is_printed_past_the_one_place():
    assert files_with(r"(?<![\w.])print\(|std(?:out|err)\.write\(") == {"escapes.py"}


def test_every_complaint_goes_through_the_one_that_keeps_it_on_a_line():
    # main.py says that it was interrupted.
    assert files_with("file=sys.stderr") == {"escapes.py", "main.py"}
