"""A profile holds the updates that were asked for, whole, and changes no number of the run."""

import collections
import dataclasses
import gzip
import json

import jax
import pytest
import tiny_run
from test_loop import STEPS, assert_same_run, make_run, raise_at, start_or_resume

from llmjax.train.loop.profiler import NAME, Profiler


def profiled(workdir, window, **changes):
    """The result of a run with a profile, and what the profiler said."""
    said = []
    run = make_run(**changes, profiler=Profiler(window, workdir / "profile", said.append))
    return start_or_resume(workdir, run), said


def read_trace(folder):
    """The events of the one trace for Perfetto below `folder`."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb")), "xprof and TensorBoard read this file"
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def updates_in(events):
    """The updates of a trace: number -> (begin, end) in microseconds."""
    marks = [event for event in events if event.get("name") == NAME and "step_num" in event.get("args", {})]
    return {int(mark["args"]["step_num"]): (mark["ts"], mark["ts"] + mark["dur"]) for mark in marks}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    return start_or_resume(workdir, make_run()), workdir


# Within a stretch between two pauses, across an evaluation and a save, and up to the last update.
@pytest.mark.parametrize("window", [range(5, 6), range(3, 8), range(11, 13)], ids=str)
def test_a_profile_has_its_updates_and_the_run_is_the_same(window, plain, tmp_path):
    result, said = profiled(tmp_path, window)
    assert_same_run(result, tmp_path, *plain)
    assert list(updates_in(read_trace(tmp_path / "profile"))) == [*window]
    assert len(said) == 1 and f"updates {window[0]} to {window[-1]} are in {tmp_path / 'profile'};" in said[0]


def test_the_updates_of_a_profile_are_whole(tmp_path):
    """It has every operation of their micro-steps, none of the update before, and none goes on at its end."""
    profiled(tmp_path, range(5, 8), evaluate_every=0)
    runs = collections.defaultdict(collections.Counter)
    for event in read_trace(tmp_path / "profile"):
        if event.get("args", {}).get("hlo_module") == "jit_micro_step":
            runs[event["args"]["run_id"]][event["name"]] += 1
    assert len(runs) == 3 * STEPS
    first, *others = runs.values()
    assert all(other == first for other in others)


def test_a_run_that_ends_within_a_profile_leaves_a_shorter_one(tmp_path):
    said = []
    run = make_run(profiler=Profiler(range(4, 10), tmp_path / "profile", said.append))
    with pytest.raises(KeyboardInterrupt):
        start_or_resume(tmp_path, dataclasses.replace(run, step=raise_at(6 * STEPS)))
    assert "updates 4 to 6, where the run ended, are in" in said[0]
    assert [*updates_in(read_trace(tmp_path / "profile"))][:3] == [4, 5, 6]
    jax.profiler.start_trace(tmp_path / "other")  # none is under way any more
    jax.profiler.stop_trace()


def test_a_run_that_ends_before_a_profile_says_that_there_is_none(plain, tmp_path):
    result, said = profiled(tmp_path, range(50, 60))
    assert_same_run(result, tmp_path, *plain)
    assert said == ["profile: the run ended before update 50, so there is none"]


def test_a_profiler_that_fails_ends_no_run(plain, tmp_path):
    jax.profiler.start_trace(tmp_path / "another")  # of the program around the run
    try:
        result, said = profiled(tmp_path, range(3, 5))
    finally:
        jax.profiler.stop_trace()
    assert_same_run(result, tmp_path, *plain)
    assert len(said) == 1 and said[0].startswith("profile: none was made (")


def test_the_speed_of_an_update_is_not_that_of_the_profiler(tmp_path):
    profiled(tmp_path, range(6, 8), evaluate_every=0)
    lines = [line for line in tiny_run.lines_of(tmp_path) if line["kind"] == "train"]
    unknown = [line["update"] for line in lines if "tokens_per_second" not in line]
    assert unknown == [1, 5, 7]
