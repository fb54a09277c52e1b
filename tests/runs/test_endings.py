"""How a run ends: finished, stopped, or with a failure after training; what it exits with and what it leaves."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_run
from tiny_run import command, start

from llmjax import main
from llmjax.train.checkpoint.checkpoint import Checkpoints
from tests.modes.test_modes import compile_once, run  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    tiny_run.write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """A finished run of 6 updates: not to be written to."""
    assert main.main(command(folder, f"--workdir={folder / 'trained'}")) == 0
    return folder / "trained"


def saved(workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.updates()


def end(capsys, words, code):
    """What is said on stdout and stderr by a run that ends with this exit code."""
    assert main.main(words) == code
    return capsys.readouterr()


def test_a_finished_run_says_so_and_is_not_shortened(folder, trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    for asked in (6, 4):
        out = run(capsys, command(folder, f"--workdir={workdir}", train__num_updates=asked))
        assert f"finished: 6 updates are done, and train.num_updates={asked} asks for no more" in out
        assert "the first update compiles" not in out and "done after" not in out
        assert json.loads((workdir / "config.json").read_text())["train"]["num_updates"] == 6
        assert re.search(r"train on .*--config\.train\.num_updates=12\n", out)


def test_no_updates_leave_what_the_commands_need(folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    out = run(capsys, command(folder, f"--workdir={workdir}", train__num_updates=0))
    assert "finished: 0 updates" in out and "held-out loss" in out and saved(workdir) == [0]
    assert re.search(r"train on .*--config\.train\.num_updates=100\n", out)
    assert "update 0 of" in run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=evaluate"])


def broken(monkeypatch, what):
    """Lets one thing fail that follows training."""

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    tiny_run.replace_in_modes(monkeypatch, what, fail)


AFTER = {
    "score_held_out": "evaluation failed",
    "write_samples": "sampling failed",
    "layer_statistics": "looking at its layers failed",
    "probe": "probing failed",
    "finish": "writing its summary and report failed",
}


QUICK = ("write_samples", "finish", "make_corpus", "probe")  # the others take as long, and differ in little


def mostly_slow(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("what", mostly_slow(AFTER))
def test_what_fails_after_training_is_made_good_by_the_same_command(
    what, folder, tmp_path, capsys, monkeypatch
):
    workdir = tmp_path / "run"
    words = command(folder, f"--workdir={workdir}", evaluate__every=0, checkpoint__every=0,
                    train__statistics_every=6, evaluate__probes="position")  # fmt: skip
    with monkeypatch.context() as patch:
        broken(patch, what)
        _, err = end(capsys, words, 1)
    assert err.count("\n") == 1 and AFTER[what] in err and "No space left on device" in err, err
    assert "give the same command again" in err and saved(workdir) == [6]
    make_run = tiny_run.in_modes("make_run")

    def untrained(*args):
        return dataclasses.replace(make_run(*args), step=lambda *args: pytest.fail("it trained again"))

    tiny_run.replace_in_modes(monkeypatch, "make_run", untrained)
    out = run(capsys, words)
    assert (
        "finished: 6 updates are done" in out and "the model continued" in out and "loss by position" in out
    )
    assert (workdir / "report.html").exists() and (workdir / "probes.json").exists()
    lines = tiny_run.read_lines(workdir)
    assert [line["kind"] for line in lines] == ["train"] * 6 + ["statistics", "evaluate"]


STOPS = {"make_corpus": [], "make_program": [], "probe": [6], "finish": [6]}


@pytest.mark.parametrize("what", mostly_slow(STOPS))
def test_a_stop_before_or_after_training_is_at_once_and_nothing_is_lost(
    what, folder, tmp_path, capsys, monkeypatch
):
    words = command(folder, f"--workdir={tmp_path / 'run'}", evaluate__probes="position")
    called = tiny_run.in_modes(what)

    def stopping(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return called(*args, **kwargs)

    with monkeypatch.context() as patch:
        tiny_run.replace_in_modes(patch, what, stopping)
        out, err = end(capsys, words, 75)
    assert out.endswith("\nstopped; the same command goes on from there\n") and err == ""
    if STOPS[what]:
        assert saved(tmp_path / "run")[-1:] == STOPS[what]
    assert "loss by position" in run(capsys, words)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("mode", ["evaluate", "generate"])
def test_other_modes_end_at_the_first_signal_without_a_traceback(
    mode, number, code, trained, capsys, monkeypatch
):
    for name in ("score_held_out", "generator"):
        tiny_run.replace_in_modes(monkeypatch, name, lambda *_, **__: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    _, err = end(capsys, ["llmjax", f"--workdir={trained}", f"--mode={mode}"], code)
    assert err.strip() in ("llmjax: ended by SIGTERM", "llmjax: interrupted")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def read_until(process, pattern):
    """Reads lines of stdout until one fits."""
    for line in process.stdout:
        if re.search(pattern, line):
            return
    pytest.fail(process.stderr.read())


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_saves_and_ends_quietly(folder, tmp_path):
    workdir = tmp_path / "run"
    words = command(folder, f"--workdir={workdir}", train__num_updates=3000, evaluate__every=5)
    with start(words) as process:
        read_until(process, r"^update 1/")
        process.stdout.close()
        assert process.wait(timeout=120) == 141 and process.stderr.read() == ""
    (stopped,) = {len(tiny_run.losses(workdir)), saved(workdir)[-1]}
    assert 0 < stopped < 3000


DEAF = """
import signal, time
from llmjax.train.loop.stop_request import end_on_second_interrupt
signal.signal(signal.SIGINT, lambda number, frame: print("heard", flush=True))
end_on_second_interrupt()
print("ready", flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_a_process_that_does_not_react():
    env = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", DEAF], env=env, text=True, **pipes) as process:
        read_until(process, "ready")
        for _ in range(2):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            read_until(process, "heard")
        assert process.wait(timeout=60) == 130 and process.stderr.read().strip() == "llmjax: interrupted"
