"""Runs in processes of their own: killed, asked to stop, two at once, and what of all this reaches the terminal."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import termios
import time

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import DURATION, command, finish, start

from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.workdir.contents import saved_config

pytestmark = pytest.mark.slow

LONG = {"train__num_updates": 160, "checkpoint__every": 20, "evaluate__every": 50, "generate__max_tokens": 4}
INTERRUPTED_AT = 70  # past the checkpoint of update 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tiny_run.write_corpus(folder / "corpus", documents=80)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The workdir of a run that nothing disturbs."""
    workdir = folder / "uninterrupted"
    finish(start(command(folder, f"--workdir={workdir}", **LONG)))
    return workdir


def start_and_wait(words, workdir):
    """A run that has just passed update `INTERRUPTED_AT`."""
    process = start(words)
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b'"kind": "train"') < INTERRUPTED_AT:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def final_state(workdir):
    """Every array of the last checkpoint by its path: parameters, optimizer, random key, update."""
    saved = saved_config(workdir)
    config, derived = resolve_config(read_config(saved), 1)
    vocab_size = load_tokenizer(workdir / "tokenizer").vocab_size
    program = make_program(config, derived, vocab_size, jax.devices()[:1])
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, meta = checkpoints.restore(program.abstract_saved())
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    arrays = {
        jax.tree_util.keystr(k): np.asarray(jax.random.key_data(x) if is_key(x) else x) for k, x in flat
    }
    return arrays, {
        name: meta[name] for name in ("update", "cursor", "tokens", "evaluation", "data_fingerprint")
    }


def assert_equal_runs(workdir, other):
    arrays, meta = final_state(workdir)
    expected, expected_meta = final_state(other)
    assert meta == expected_meta and arrays.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(arrays[path], array, err_msg=path)
    assert tiny_run.read_lines(workdir) == tiny_run.read_lines(other)
    assert (workdir / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


def test_a_killed_run_resumes_bit_for_bit(folder, uninterrupted):
    workdir = folder / "killed"
    words = command(folder, f"--workdir={workdir}", **LONG)
    process = start_and_wait(words, workdir)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert INTERRUPTED_AT <= len(tiny_run.losses(workdir)) < LONG["train__num_updates"]
    done = re.search(r"updates +160, (\d+) of them done", finish(start(words)))
    assert 0 < int(done[1]) < LONG["train__num_updates"]
    assert_equal_runs(workdir, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_saves_exits_well_and_resumes_bit_for_bit(number, folder, uninterrupted):
    workdir = folder / number.name
    words = command(folder, f"--workdir={workdir}", **LONG)
    process = start_and_wait(words, workdir)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 75
    assert err.strip() == "stopping after this step and a checkpoint; Ctrl-C interrupts at once"
    stopped = int(
        re.search(
            r"stopped after update (\d+)( and 1 of 2 micro-steps of the next)? and saved; go on with\n", out
        )[1]
    )
    assert len(tiny_run.losses(workdir)) == stopped < LONG["train__num_updates"]
    assert f"{stopped} of them done" in finish(start(words))
    assert_equal_runs(workdir, uninterrupted)


OURS = (
    r"plan", r"next", r"sample: after", r"the model continued", r"  \| .*", f"done after {DURATION}",
    r"  (corpus|held out|files|tokenizer|packing|model|attention|optimizer|mesh|batch|memory|updates|output) .*",
    r"  (held-out loss|perplexity|bits per byte|gzip|xz|report|resume|train on|evaluate|generate) .*",
    f"ready after {DURATION}; the first update compiles", r"update \d+/6  (held-out )?loss .*",
)  # fmt: skip
GLOO = r"\[Gloo\] Rank \d is connected .*"  # of several processes on CPUs, printed by C++ inside jaxlib
# What a run says of work that takes seconds: on a terminal always, elsewhere only where it takes more than three.
STAGES = (
    r"(importing jax|looking through data\.sources|preparing the (tokenizer|parameters)|packing|compiling the update"
    r"|training the tokenizer|sampling|compressing held-out text|writing the (report|checkpoint))  "
    + DURATION,
    r"(looking for changes|reading the text|tokenizing|evaluating) +\d+%  ?.* of .*",
)
BAR = r"\d+/6 \|.*\| (loss .*)?"


def strange(text, *patterns):
    lines = [line for line in re.split("[\r\n]+", text) if line.strip()]
    assert lines
    return [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in patterns)]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish_two(words):
    """The same run on two processes of one device each; what each printed."""
    shared = {"LLMJAX_COORDINATOR": f"localhost:{free_port()}", "LLMJAX_NUM_PROCESSES": "2"}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(words, **shared, LLMJAX_PROCESS_ID=str(i))) for i in range(2)]
        stack.callback(lambda: [process.kill() for process in processes])
        return [finish(process) for process in processes]


def start_two(*words):
    """Two processes of one device each, each with its own words."""
    shared = {"LLMJAX_COORDINATOR": f"localhost:{free_port()}", "LLMJAX_NUM_PROCESSES": "2"}
    return [start(each, **shared, LLMJAX_PROCESS_ID=str(i)) for i, each in enumerate(words)]


@pytest.mark.parametrize("difference", ["checkpoints", "config", "lock"])
def test_two_processes_that_see_different_things_end_with_one_sentence_each(difference, folder, tmp_path):
    tiny_run.write_corpus(tmp_path / "corpus", documents=80)
    settings = {"mesh__data": 2, "train__num_updates": 2, "data__cache_dir": tmp_path / "cache"}
    first = command(tmp_path, f"--workdir={tmp_path / 'one'}", **settings)
    second = [*first]
    if difference == "checkpoints":
        finish(start(first + ["--config.mesh.data=1"]))
        second[second.index(f"--workdir={tmp_path / 'one'}")] = f"--workdir={tmp_path / 'two'}"
        (tmp_path / "two").mkdir()
        for name in ("config.json", "tokenizer"):
            (tmp_path / "two" / name).symlink_to(tmp_path / "one" / name)
        sentence = "the 2 processes differ in checkpoints of --workdir: process 0 sees 2, process 1 sees nothing; give"
    elif difference == "config":
        second.append("--config.seed=7")
        sentence = "the 2 processes differ in the config: process 0 sees one of digest "
    else:
        second[second.index(f"--workdir={tmp_path / 'one'}")] = f"--workdir={tmp_path / 'two'}"
        sentence = (
            "is not one and the same for all processes: the lock that process 0 took does not appear here"
        )
    processes = start_two(first, second)
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2 and err.count("\n") == 1 and sentence in err, err


def test_a_second_run_in_a_workdir_is_refused_and_the_first_goes_on(folder, tmp_path):
    words, lock = command(folder, f"--workdir={tmp_path / 'run'}", **LONG), tmp_path / "run" / "lock"
    process = start(words)
    while not lock.exists() or not lock.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # or it might be done before the second begins
    second = start(words)
    _, err = second.communicate(timeout=300)
    process.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and err.count("\n") == 1
    assert f"is in use: process {process.pid} on " in err and "give another --workdir" in err
    finish(process)
    assert len(tiny_run.losses(tmp_path / "run")) == LONG["train__num_updates"]
    assert not lock.exists()


PROBES = {"evaluate__probes": "position,context,copy"}


def probed(workdir):
    """What the probes showed, curve by curve."""
    probes = json.loads((workdir / "probes.json").read_text())
    return [value for name in ("position", "context", "copy") for value in probes[name]["loss"]]


@pytest.fixture(scope="module")
def alone(folder):
    workdir = folder / "alone"
    finish(start(command(folder, f"--workdir={workdir}", **PROBES)))
    return workdir


@pytest.mark.parametrize(
    ("axis", "engine"),
    [("data", "in_place"), ("fsdp", "multisteps"), ("seq", "in_place"), ("data", "fused")],
)
def test_two_processes_train_as_one(axis, engine, alone, tmp_path):
    tiny_run.write_corpus(tmp_path / "corpus", documents=80)  # without a cache: both build it at once
    workdir = tmp_path / "two"
    settings = {"mesh__data": 1, f"mesh__{axis}": 2, "compute__engine": engine, **PROBES}
    first, second = finish_two(command(tmp_path, f"--workdir={workdir}", **settings))
    assert f"{axis}=2" in first and strange(second, GLOO) == []
    lines, expected = tiny_run.read_lines(workdir), tiny_run.read_lines(alone)
    assert [(x["kind"], x["update"]) for x in lines] == [(x["kind"], x["update"]) for x in expected]
    assert [x["loss"] for x in lines] == pytest.approx([x["loss"] for x in expected], rel=1e-5)
    assert probed(workdir) == pytest.approx(probed(alone), rel=1e-5)
    one = ("--config.mesh.data=1", f"--config.mesh.{axis}=1", "--config.train.num_updates=8")
    finish(start(["llmjax", f"--workdir={workdir}", *one]))
    assert len(tiny_run.losses(workdir)) == 8


@pytest.mark.parametrize("axis", ["data", "seq"])
def test_two_processes_cut_rows_and_begin_with_other_parameters_as_one(axis, folder, alone, tmp_path):
    growing = ("--config.data.length_points=0:8,1024:32", f"--config.checkpoint.init_from={alone}")
    finish(start(command(folder, f"--workdir={tmp_path / 'one'}", *growing)))
    settings = {"mesh__data": 1, f"mesh__{axis}": 2}
    first, _ = finish_two(command(folder, f"--workdir={tmp_path / 'two'}", *growing, **settings))
    assert f"beginning with the parameters of update 6 of {alone}" in first
    lines, expected = (tiny_run.read_lines(tmp_path / name) for name in ("two", "one"))
    assert [x.get("seq_len") for x in lines if x["kind"] == "train"] == [8, 8, 32, 32, 32, 32]
    assert [x["loss"] for x in lines] == pytest.approx([x["loss"] for x in expected], rel=1e-5)


def test_every_line_of_a_run_is_one_of_ours(folder, tmp_path):
    process = start(command(folder, f"--workdir={tmp_path / 'run'}"))
    out, err = process.communicate()
    assert process.returncode == 0 and err == ""
    assert strange(out, *OURS, *STAGES) == []


def test_a_terminal_shows_a_bar_and_nothing_else_of_a_library(folder, tmp_path):
    words = command(folder, f"--workdir={tmp_path / 'run'}", tokenizer__kind="bpe", tokenizer__vocab_size=300)
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    process = start(words, stdout=end, stderr=end)
    os.close(end)
    parts = []
    while True:
        try:
            parts.append(os.read(terminal, 1 << 16))
        except OSError:  # how a terminal says that the other end is closed
            break
    os.close(terminal)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "\n", b"".join(parts).decode())
    assert re.search(r"6/6 \|.*\| loss \d", text)
    assert "compiling the update  0 s" in text and "evaluating" in text
    assert strange(text, *OURS, BAR, *STAGES) == []
