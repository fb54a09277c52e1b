"""Prompts typed one after the other: the texts of --prompt_file, from a model that is loaded and compiled once."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
import quick
import tiny_run
from tiny_run import command

from llmjax import main
from llmjax.models.gpt import GPT

# As main.main would be given it.
SAMPLED = ("--mode=generate", "--config.generate.temperature=2", "--config.generate.top_p=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interactive")
    tiny_run.write_corpus(folder / "corpus")
    settings = {"train__num_updates": 2, "evaluate__every": 0, "train__tokens_per_update": 256,
                "compute__accumulation_steps": 1}  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(command(folder, f"--workdir={folder / 'run'}", **settings)) == 0
    return folder / "run"


def said(capsys, monkeypatch, data, workdir, *words):
    """What is printed where `data` stands on standard input."""
    stdin = types.SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main.main(["llmjax", f"--workdir={workdir}", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("data", ["river\n\n春江\nriver", "\ufeffriver\r\n stone \r\n\r\nriver\n"])
def test_lines_of_a_pipe_get_the_texts_that_a_file_of_prompts_gets(
    data, samples, trained, capsys, monkeypatch
):
    words = (*SAMPLED, f"--config.generate.num_samples={samples}")
    data = data.encode()
    out = said(capsys, monkeypatch, data, trained, *words, "--interactive")
    assert out == said(capsys, monkeypatch, data, trained, *words, "--prompt_file=-")
    texts = re.split("^---.*\n", out, flags=re.M)[1:]
    assert len(texts) == len(set(texts)) == 3 * samples  # the same line again is continued in another way


def test_a_pipe_with_nothing_in_it_gives_nothing(trained, capsys, monkeypatch):
    assert said(capsys, monkeypatch, b"", trained, *SAMPLED, "--interactive") == ""


def test_lines_of_like_length_compile_nothing_new(trained, capsys, monkeypatch):
    traced, decode = [], GPT.decode

    def counting(self, params, tokens, *args):
        if isinstance(jax.tree.leaves(params)[0], jax.core.Tracer):
            traced.append(tokens.shape)
        return decode(self, params, tokens, *args)

    monkeypatch.setattr(GPT, "decode", counting)
    said(capsys, monkeypatch, b"a\nriver stone\nriver cloud light\nb\n", trained, *SAMPLED, "--interactive")
    assert traced == [(1, 64), (1, 1)]


def test_a_long_line_gets_one_note_in_a_session(trained, capsys, monkeypatch):
    stdin = types.SimpleNamespace(
        buffer=io.BytesIO(b"river " * 9 + b"\n" + b"cloud " * 9), isatty=lambda: False
    )
    monkeypatch.setattr("sys.stdin", stdin)
    assert main.main(["llmjax", f"--workdir={trained}", *SAMPLED, "--interactive"]) == 0
    assert capsys.readouterr().err.count("trained on data.seq_len=32") == 1


def test_a_line_that_is_not_text_is_named(trained, capsys, monkeypatch):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(b"river\nst\xffone\n"), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main.main(["llmjax", f"--workdir={trained}", *SAMPLED, "--interactive"]) == 2
    out, err = capsys.readouterr()
    assert "--- 1\nriver" in out and "prompt 2 of standard input is not UTF-8 at byte 2; correct it" in err


@pytest.mark.parametrize("other", ["--prompt=river", "--prompt_file=-"])
def test_prompts_from_elsewhere_are_refused(other, trained, capsys):
    assert main.main(["llmjax", f"--workdir={trained}", "--mode=generate", "--interactive", other]) == 2
    name = other.split("=")[0]
    assert f"reads its prompts from standard input, but {name} is given; leave" in capsys.readouterr().err


class Terminal:
    """A process on a terminal of its own, as a person starts it."""

    def __init__(self, *words):
        self._ours, theirs = pty.openpty()
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny_run.ROOT), "TERM": "dumb"}
        env["XLA_FLAGS"] = " ".join(quick.FLAGS)
        program = [sys.executable, "-m", "llmjax.main", *words]
        self.process = subprocess.Popen(
            program, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=tiny_run.ROOT
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, pattern, seconds=60):
        """Reads until `pattern` was printed, and forgets everything up to there; returns it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.S)):
            assert time.monotonic() < end and self.process.poll() is None, self.seen
            if select.select([self._ours], [], [], 1)[0]:
                self.seen += os.read(self._ours, 65536).decode(errors="replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text):
        os.write(self._ours, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_on_a_terminal_ctrl_c_ends_a_text_and_ctrl_d_the_session(trained):
    endless = "--config.generate.max_tokens=100000"
    terminal = Terminal(f"--workdir={trained}", "--mode=generate", "--interactive", endless)
    try:
        terminal.wait_for("> ")
        for line in ("river", "stone", "cloud"):  # more often than a process outlives elsewhere
            terminal.type(f"{line}\n")
            terminal.wait_for(rf"{line}.*{line}.{{20}}")  # the echo, and then a text that grows
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_for("\n> ")
        time.sleep(1)  # until readline, which has printed the mark, waits for a key
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("Ctrl-D ends.*> ")
        time.sleep(2.5)  # longer than a second Ctrl-C lets a process live elsewhere
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
