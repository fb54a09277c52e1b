"""W&B is told what TensorBoard is told, goes on with its run after a resume, and can fail without harm."""

import importlib.util
import json
import math
import sys

import pytest
from event_files import read_events
from fake_wandb import Wandb
from sections import section

from llmjax.errors import UserError
from llmjax.workdir.recorder import Recorder
from llmjax.workdir.samples import Sample
from llmjax.workdir.sinks.contract import NOWHERE
from llmjax.workdir.sinks.table import check_sinks
from llmjax.workdir.sinks.weights_and_biases import FILE

OFFLINE = section("metrics", wandb="offline", wandb_project="stones")
CONFIG = {"seed": 3, "model": {"num_layers": 2}}


def record(workdir, metrics=OFFLINE, resume_update=0, last=4):
    """The record of a small run."""
    with Recorder(
        workdir,
        resume_update=resume_update,
        num_tokens=4,
        tokens_per_update=1,
        metrics=metrics,
        config=CONFIG,
    ) as recorder:
        for update in range(resume_update + 1, last + 1):
            recorder.train(
                update, {"tokens": update, "loss": 1 / update, "reason": "x", "noise_scale": math.inf}
            )
        recorder.evaluate(last, {"tokens": last, "loss": 2.0})
        recorder.samples(last, [Sample(last, "river", "stone \udcff"), Sample(last, "", "春江")])
        recorder.event(last, "spike", "a text")
        recorder.flush()
        recorder.summarize({"updates": last, "held_out/loss": 2.0})


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def failing_in(name, monkeypatch):
    def fails(called):
        if called == name:
            raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails))


def test_it_gets_the_numbers_of_tensorboard_over_the_updates(wandb, tmp_path):
    record(tmp_path)
    (run,) = wandb.runs
    told = {
        (line["update"], name): value
        for line in run.logged
        for name, value in line.items()
        if name not in ("update", "samples")
    }
    shown = {
        (event.step, value.tag): value.simple_value
        for event in read_events(tmp_path)
        for value in event.summary.value
        if value.HasField("simple_value")
    }
    assert told == pytest.approx(shown) and (4, "evaluate/loss") in told
    assert run.metrics == {"update": None, "*": "update"}


def test_it_gets_config_samples_and_results(wandb, tmp_path):
    record(tmp_path)
    (run,) = wandb.runs
    assert run.settings["config"] == CONFIG and run.settings["project"] == "stones"
    assert run.settings["mode"] == "offline" and run.settings["name"] == tmp_path.name
    assert [line["samples"] for line in run.logged if "samples" in line] == [
        [
            {"update": 4, "prompt": "river", "text": "stone \\udcff"},
            {"update": 4, "prompt": "", "text": "春江"},
        ]
    ]
    assert run.results == {"updates": 4, "held_out/loss": 2.0} and run.exit_code == 0


@pytest.mark.parametrize("damage", [None, "", "[]", '{"id": 3}', "\udcff"], ids=repr)
def test_a_resumed_run_goes_on_in_the_same_run_unless_its_id_is_lost(damage, wandb, tmp_path):
    online = section("metrics", wandb="online")
    record(tmp_path, online)
    if damage is not None:
        (tmp_path / FILE).write_bytes(damage.encode("utf-8", "surrogateescape"))
    record(tmp_path, online, resume_update=4, last=6)
    record(tmp_path, online, resume_update=6, last=8)
    first, second, third = (run.settings["id"] for run in wandb.runs)
    assert (first == second) == (damage is None) and second == third
    assert [run.settings["resume"] for run in wandb.runs] == ["allow"] * 3


def test_a_failed_training_is_marked_as_failed(wandb, tmp_path):
    with (
        pytest.raises(RuntimeError),
        Recorder(tmp_path, resume_update=0, num_tokens=4, tokens_per_update=1, metrics=OFFLINE),
    ):
        raise RuntimeError
    assert wandb.runs[0].exit_code == 1


@pytest.mark.parametrize("what", ["log", "summary", "finish"])
def test_a_failure_is_said_once_and_harms_nothing_else(what, tmp_path, capsys, monkeypatch):
    record(tmp_path / "plain", NOWHERE)
    capsys.readouterr()
    failing_in(what, monkeypatch)
    record(tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert lines == ["W&B failed and is told nothing more (no network); the run goes on"]
    plain, run = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "run"))
    assert run == plain


def test_where_it_does_not_begin_a_new_run_is_refused_and_one_that_resumes_goes_on(
    tmp_path, capsys, monkeypatch
):
    failing_in("init", monkeypatch)
    with pytest.raises(
        UserError, match=r"metrics.wandb='offline', but W&B did not begin \(no network\); run"
    ):
        record(tmp_path)
    record(tmp_path, resume_update=2)
    assert "W&B did not begin and is told nothing (no network); the run goes on" in capsys.readouterr().out


def test_nothing_imports_it_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it is an error now
    record(tmp_path, NOWHERE)
    assert not (tmp_path / FILE).exists()


def test_without_the_package_it_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_sinks(NOWHERE)
    with pytest.raises(UserError, match=r"metrics.wandb='offline' needs the package wandb.*pip install"):
        check_sinks(OFFLINE)


@pytest.mark.parametrize("project", ["", "a/b", "x" * 129])
def test_a_name_that_is_none_of_a_project_is_refused(project):
    with pytest.raises(UserError, match=r"metrics.wandb_project=.* is no name of a W&B project; give"):
        section("metrics", wandb_project=project)


def test_the_package_itself_writes_files_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the package wandb, of the extra llmjax[wandb]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(tmp_path)
    record(tmp_path, resume_update=4, last=6)
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    known = json.loads((tmp_path / FILE).read_text())["id"]
    assert first.name.endswith(known) and second.name.endswith(known)
    (path,) = first.rglob("*.table.json")
    assert json.loads(path.read_text())["data"] == [[4, "river", "stone \\udcff"], [4, "", "春江"]]
    assert first.joinpath(f"run-{known}.wandb").read_bytes().count(b"train/loss") >= 4
