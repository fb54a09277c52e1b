"""Who may train in a workdir: one run at a time, whatever became of the one before it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llmjax.errors import UserError
from llmjax.workdir import lock
from llmjax.workdir.lock import Lock, wait_to_see

HOLDER = """
import pathlib, sys, time
from llmjax.workdir.lock import Lock
with Lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def start_holder(workdir, source=HOLDER):
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def read(workdir):
    return json.loads((workdir / "lock").read_text())


def left_by(workdir, **changes):
    """The lock that some other run left in `workdir`."""
    workdir.mkdir(exist_ok=True)
    holder = dataclasses.asdict(lock._this_process()) | {"token": "other"} | changes
    (workdir / "lock").write_text(json.dumps(holder))
    return holder


def test_a_second_run_is_refused_with_host_and_pid_and_the_first_is_not_disturbed(tmp_path):
    with start_holder(tmp_path) as other:
        before = read(tmp_path)
        with pytest.raises(UserError) as error:
            Lock(tmp_path)
        sentence = str(error.value)
        assert (
            f"--workdir={tmp_path} is in use: process {other.pid} on {before['host']} trains there"
            in sentence
        )
        assert "stop it, or give another --workdir" in sentence and read(tmp_path) == before
        other.kill()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_run_is_taken_over(reaped, tmp_path):
    with start_holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        if reaped:
            other.wait()
        else:
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with Lock(tmp_path):
            assert read(tmp_path)["pid"] == os.getpid()


def test_a_lock_that_a_forked_worker_outlives_is_taken_over(tmp_path):
    forking = HOLDER.replace(
        '    print("held"', '    import os\n    child = os.fork()\n    child and print(f"held\\n{child}"'
    )
    with start_holder(tmp_path, forking) as other:
        child = int(other.stdout.readline())
        other.kill()
        other.wait()
        try:
            with Lock(tmp_path):
                assert read(tmp_path)["pid"] == os.getpid()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_is_free_again_after_its_run_and_leaves_nothing(tmp_path):
    workdir = tmp_path / "runs" / "new"
    for _ in range(2):
        with Lock(workdir) as held:
            held.check()
            assert [path.name for path in workdir.iterdir()] == ["lock"]
        assert not workdir.exists()
    workdir.mkdir(parents=True)
    (workdir / "config.json").touch()
    with Lock(workdir):
        pass
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_within_one_process_a_workdir_is_held_once(tmp_path):
    with Lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on .* trains there"):
        Lock(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\0" * 100])
def test_a_lock_that_nobody_signed_is_free(text, tmp_path):
    (tmp_path / "lock").write_text(text)
    with Lock(tmp_path) as held:
        held.check()


@pytest.fixture
def no_kernel_locks(monkeypatch):
    """A file system without flock."""

    def flock(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)


def test_without_the_kernel_a_dead_process_is_known_by_its_number_and_start(no_kernel_locks, tmp_path):
    with start_holder(tmp_path) as other:
        with pytest.raises(UserError, match=f"process {other.pid} on "):
            Lock(tmp_path)
        other.kill()
        other.wait()
        with Lock(tmp_path):
            pass
    left_by(tmp_path, started="1")  # the number of this very process, given anew
    with Lock(tmp_path):
        pass


def test_of_two_that_start_at_once_without_the_kernel_one_gives_way(no_kernel_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: left_by(tmp_path))
    with pytest.raises(UserError, match="is in use"):
        Lock(tmp_path)


ELSEWHERE = {"host": "elsewhere", "kernel": "another-boot pid:[1]", "pid": 7}


def test_the_lock_of_another_machine_stands_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.04)
    left_by(tmp_path, **ELSEWHERE)
    touched = []

    def sleep(seconds):
        touched.append(seconds)
        os.utime(tmp_path / "lock", (0, 1e9 + len(touched)))

    monkeypatch.setattr(lock.time, "sleep", sleep)
    told = []
    with pytest.raises(UserError, match="in use: process 7 on elsewhere trains there"):
        Lock(tmp_path, told.append)
    assert len(told) == 1 and "seeing for up to 60 s whether it is alive" in told[0] and len(touched) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_the_lock_of_another_machine_is_taken_over_when_it_is_touched_no_more(tmp_path, monkeypatch):
    left_by(tmp_path, **ELSEWHERE)
    os.utime(tmp_path / "lock", (0, time.time() - lock.STALE_SECONDS - 5))
    told = []
    with Lock(tmp_path, told.append):
        assert told == [] and read(tmp_path)["pid"] == os.getpid()
    left_by(tmp_path, **ELSEWHERE)  # lately
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.05)
    with Lock(tmp_path, told.append):
        assert len(told) == 1 and read(tmp_path)["pid"] == os.getpid()


def test_a_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    with Lock(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        end = time.monotonic() + 10
        while os.stat(tmp_path / "lock").st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_run_that_was_taken_for_dead_writes_no_more(tmp_path):
    with Lock(tmp_path) as held:
        holder = left_by(tmp_path, **ELSEWHERE)
        with pytest.raises(UserError, match="now held by process 7 on elsewhere, .* nothing more is written"):
            held.check()
    assert read(tmp_path) == holder  # nor does it take away the lock of the other
    with Lock(tmp_path / "gone") as held:
        (tmp_path / "gone" / "lock").unlink()
        with pytest.raises(UserError, match="now held by nobody"):
            held.check()


def test_other_processes_of_a_run_must_see_its_lock(tmp_path):
    with Lock(tmp_path) as held:
        wait_to_see(tmp_path, held.token, seconds=0)
        with pytest.raises(UserError, match="is not one and the same for all processes"):
            wait_to_see(tmp_path / "another disk", held.token, seconds=0)
        with pytest.raises(UserError, match="put it on a disk that all of them share"):
            wait_to_see(tmp_path, "another run", seconds=0)
