"""Runs whose batch varies, whose updates are fused, that spike or look at their layers: as a user starts them."""

import json
import shutil

import pytest
import tiny_run
from tiny_run import command

from llmjax import main
from llmjax.train.checkpoint import shelf
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

CONTROLLED = {
    "train__num_updates": 24, "train__tokens_per_update": 512, "compute__accumulation_steps": 2, "evaluate__every": 12,
    "controller__name": "noise_scale", "controller__k_max": 8, "controller__half_life": 2000,
    "controller__batch_per_noise": 30.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered")
    tiny_run.write_corpus(folder / "corpus")
    return folder


def lines(workdir, kind="train"):
    return [line for line in tiny_run.read_lines(workdir) if line["kind"] == kind]


def test_fused_updates_on_a_mesh_give_the_losses_of_micro_steps_on_one_device(folder, capsys):
    plain, fused = folder / "plain", folder / "fused"
    run(capsys, command(folder, f"--workdir={plain}", compute__scan_layers=True))
    settings = {
        "compute__engine": "fused",
        "compute__gather": "update",
        "mesh__fsdp": 4,
        "mesh__data": 2,
    }
    out = run(capsys, command(folder, f"--workdir={fused}", **settings))
    assert "fused" in out
    assert tiny_run.losses(fused) == pytest.approx(tiny_run.losses(plain), rel=1e-5)
    # and its checkpoints are the same: the run goes on in the other way
    run(capsys, command(folder, f"--workdir={fused}", train__num_updates=8))
    run(capsys, command(folder, f"--workdir={plain}", train__num_updates=8))
    assert tiny_run.losses(fused) == pytest.approx(tiny_run.losses(plain), rel=1e-5)


def test_a_controlled_run_says_why_and_shows_it(folder, capsys):
    workdir = folder / "controlled"
    out = run(capsys, command(folder, f"--workdir={workdir}", **CONTROLLED))
    assert "by noise_scale" in out and "of the tokens" in out
    train = lines(workdir)
    steps = [line["accumulation_steps"] for line in train]
    assert len(set(steps)) > 1 and sum(steps) == 48 and max(steps) <= 8
    for line, before in zip(train[1:-1], train):
        changed = f"{before['accumulation_steps']:.0f} -> {line['accumulation_steps']:.0f}"
        assert (changed in line["reason"]) == (line["accumulation_steps"] != before["accumulation_steps"])
    report = (workdir / "report.html").read_text()
    assert "Tokens per update" in report and "oise scale" in report


def test_a_batch_that_grows_by_schedule_ends_at_the_tokens_of_the_run(folder, capsys):
    workdir = folder / "scheduled"
    points = "--config.train.batch_points=0:256,1024:1024"
    out = run(capsys, command(folder, f"--workdir={workdir}", points, train__batch_schedule="piecewise"))
    assert "piecewise" in out
    assert [line["accumulation_steps"] for line in lines(workdir)] == [1, 1, 1, 1, 4, 4]
    assert lines(workdir)[-1]["tokens"] == 6 * 512


def test_a_run_stopped_in_its_first_update_goes_on_there_whatever_is_asked_for_now(
    folder, capsys, monkeypatch
):
    whole, parts = folder / "unstopped", folder / "stopped"
    points = "--config.train.batch_points=0:1024"
    settings = {"train__batch_schedule": "piecewise"}
    run(capsys, command(folder, f"--workdir={whole}", points, **settings))
    polls = iter(range(100))
    monkeypatch.setattr("llmjax.train.loop.stop_request.StopRequest.poll", lambda self: next(polls) == 1)
    assert main.main(command(folder, f"--workdir={parts}", points, **settings)) == 75
    out = capsys.readouterr().out
    assert "stopped after update 0 and 2 of 4 micro-steps of the next and saved" in out
    monkeypatch.undo()
    fused = command(folder, f"--workdir={parts}", points, **settings, compute__engine="fused")
    assert "resume with compute.engine=in_place" in refuse(capsys, fused)
    another = command(folder, f"--workdir={parts}", points, **settings, compute__accumulation_steps=4)
    assert "resume with compute.micro_batch_size=8" in refuse(
        capsys, [*another, "--config.mesh.data=4", "--config.mesh.seq=2"]
    )
    old = as_saved_by_an_older_version(parts, folder / "old")
    for workdir in (parts, old):
        # Updates of a single micro-step from now on; the open one is still of four.
        run(capsys, command(folder, f"--workdir={workdir}", "--config.train.batch_points=0:256", **settings))
        assert [line["accumulation_steps"] for line in lines(workdir)] == [4] + [1] * 8
        assert lines(workdir)[0] == lines(whole)[0]
        assert not (workdir / "partial_update").exists() and not (workdir / "window").exists()


def as_saved_by_an_older_version(workdir, copy):
    """A copy of a workdir with a stopped update, under the names that version 0.1 gave to the folder and its meta."""
    shutil.copytree(workdir, copy)
    (copy / "partial_update").rename(copy / "window")
    saved = json.loads((copy / "saved.json").read_text())
    (copy / "saved.json").write_text(json.dumps(saved | {"folder": "window"}))
    for path in (copy / "window").glob(f"*/{shelf.META}"):
        meta = json.loads(path.read_text())
        meta["window"] = meta.pop("partial_update")
        path.write_text(json.dumps(shelf.with_digest({k: v for k, v in meta.items() if k != shelf.DIGEST})))
    return copy


def test_a_spike_is_told_with_the_text_of_its_documents(folder, capsys):
    workdir = folder / "spike"
    settings = {"stability__warmup_updates": 10, "stability__threshold": 1e-6, "train__num_updates": 20}
    out = run(capsys, command(folder, f"--workdir={workdir}", **settings))
    events = lines(workdir, "event")
    assert events and events[0]["event"] == "spike" and events[0]["text"] in out
    (first, *_) = sorted((workdir / "documents").iterdir())
    assert str(workdir / "documents") in events[0]["text"]
    text = first.read_text()
    assert text.startswith("## ") and any(word in text for word in tiny_run.WORDS)


def test_layers_are_looked_at_when_asked(folder, capsys):
    workdir = folder / "layers"
    run(capsys, command(folder, f"--workdir={workdir}", train__statistics_every=3, model__num_layers=2))
    found = lines(workdir, "statistics")
    assert [line["update"] for line in found] == [3, 6]
    assert len(found[0]["gradient_norm"]) == len(found[0]["residual_rms"]) == 2
    json.dumps(found)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"controller__k_min": 9, "controller__k_max": 4},
            "controller.k_min=9 is greater than controller.k_max=4",
        ),
        (
            {"compute__engine": "scan"},
            "compute.engine='scan' is not known; use one of in_place, multisteps, fused",
        ),
        ({"train__batch_schedule": "piecewise", "train__batch_points": "0:512,100:256"}, "goes backwards"),
        (
            {
                "train__batch_schedule": "linear",
                "train__batch_points": "0:512",
                "controller__name": "norm_test",
            },
            "both decide the batch size",
        ),
        ({"stability__on_spike": "stop"}, "stability.on_spike='stop' is not known"),
        ({"optimizer__clip": "layer"}, "optimizer.clip='layer' is not known"),
    ],
)
def test_what_cannot_be_steered_is_one_sentence(folder, capsys, settings, sentence):
    assert sentence in refuse(capsys, command(folder, f"--workdir={folder / 'refused'}", **settings))
