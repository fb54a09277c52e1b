"""Runs of adapters from the command line: begun, resumed, evaluated, used and begun from, and what their files hold."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import command

from llmjax import main
from llmjax.modes.dispatch import make_request
from llmjax.modes.generate import load
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.workdir.contents import saved_config
from tests.modes import test_classify
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture
from tests.runs.test_runs_of_families import OTHERS, settings_of
from tools import convert

LORA = {"lora__rank": 2, "lora__targets": "attention,w_up", "optimizer__schedule_updates": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    tiny_run.write_corpus(folder / "corpus", text=tiny_run.CHINESE)
    assert main.main(command(folder, f"--workdir={folder / 'base'}")) == 0
    assert main.main(tuned(folder, folder / "run")) == 0
    return folder


def tuned(folder, workdir, *words, **changes):
    """The command of a run of adapters that begins with the run in `folder`/base."""
    settings = LORA | {"checkpoint__init_from": folder / "base"} | changes
    return command(folder, f"--workdir={workdir}", *words, **settings)


def held_out(capsys, words):
    """The held-out loss that a mode prints, as what a record must have."""
    return pytest.approx(float(re.search(r"held-out loss +(\S+)", run(capsys, words))[1]), abs=1e-4)


def last_loss(workdir):
    return [line for line in tiny_run.read_lines(workdir) if line["kind"] == "evaluate"][-1]["loss"]


def test_the_plan_says_how_many_parameters_train(folder):
    plan = json.loads((folder / "run" / "summary.json").read_text())["plan"]
    assert re.search(
        r"parameters, [\d,]+ train \(adapters of rank 2 in 5 arrays\) and .* are frozen", plan["model"]
    )


def test_a_rank_beyond_the_matrices_is_pointed_out(folder, tmp_path, capsys):
    said = run(capsys, tuned(folder, tmp_path / "run", "--mode=plan", lora__rank=17))
    assert "lora.rank=17 is larger than the smaller side of layers/attention/wk_DKH, 16, so that" in said
    assert "larger than the smaller side" not in run(
        capsys, tuned(folder, tmp_path / "run", "--mode=plan", lora__rank=16)
    )


def test_a_checkpoint_holds_adapters_alone_and_the_workdir_their_base_once(folder):
    with Checkpoints(folder / "run" / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.read_meta()
    assert len(meta["frozen"]) == 64 and meta["config"]["checkpoint"]["init_from"] == str(folder / "base")
    held = {
        name: (folder / "run" / name / "state" / "_METADATA").read_text()
        for name in ("checkpoints/6", "frozen/0")
    }
    assert "embedding_VD" in held["frozen/0"] and "embedding_VD" not in held["checkpoints/6"]
    assert "'wq_DNH', 'A'" in held["checkpoints/6"] and "'mu'" in held["checkpoints/6"]
    assert [path.name for path in (folder / "run" / "frozen").iterdir()] == ["0"]


@pytest.mark.parametrize("engine", ["in_place", "fused"])
def test_a_run_that_is_stopped_and_resumed_has_the_losses_of_one_that_was_not(folder, tmp_path, engine):
    for updates in (3, 6):
        words = tuned(folder, tmp_path, train__num_updates=updates, compute__engine=engine)
        assert main.main(words) == 0
    found, expected = tiny_run.losses(tmp_path), tiny_run.losses(folder / "run")
    # Engines sum in different orders; one and the same engine goes on bit for bit.
    assert found == (expected if engine == "in_place" else pytest.approx(expected, rel=1e-5))


def test_every_use_of_a_run_has_the_adapters_in_it_and_needs_no_base(folder, tmp_path, capsys):
    alone = shutil.copytree(folder / "run", tmp_path / "alone")
    moved = (folder / "base").rename(folder / "away")
    try:
        said = run(capsys, ["llmjax", f"--workdir={alone}", "--mode=generate", "--prompt=river"])
        expected = last_loss(alone)
        assert (
            "river" in said
            and held_out(capsys, ["llmjax", f"--workdir={alone}", "--mode=evaluate"]) == expected
        )
    finally:
        moved.rename(folder / "base")
    # Another run may begin with it, and a converted one is the same model without adapters.
    words = command(folder, f"--workdir={tmp_path / 'new'}", "--mode=evaluate", checkpoint__init_from=alone)
    assert held_out(capsys, words) == expected
    assert convert.main(["--from", "llmjax", "--to", "llmjax", str(alone), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    words = command(
        folder, f"--workdir={tmp_path / 'new'}", "--mode=evaluate", checkpoint__init_from=tmp_path / "merged"
    )
    assert held_out(capsys, words) == expected
    assert last_loss(folder / "base") != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("what", ["gone", "of another run"])
def test_other_frozen_parameters_are_refused(folder, tmp_path, capsys, what):
    workdir = shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(workdir / "frozen")
    if what != "gone":
        shutil.copytree(folder / "base" / "checkpoints" / "6", workdir / "frozen" / "0")
    for mode in ("generate", "train"):
        said = refuse(capsys, tuned(folder, workdir, f"--mode={mode}", train__num_updates=9))
        assert (
            "frozen does not hold the frozen parameters that the checkpoint of update 6 was trained with"
            in said
        )
    assert "frozen does not hold" in run(capsys, tuned(folder, workdir, "--mode=plan"))


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
def test_an_average_is_the_mean_of_the_newest_checkpoints(folder, tmp_path, capsys, optimizer):
    workdir = folder / "run"
    if optimizer != "adamw":
        workdir = tmp_path / "run"
        words = {"optimizer__name": optimizer, "optimizer__schedule": "constant"}
        assert main.main(command(folder, f"--workdir={workdir}", **words)) == 0
    request = make_request("generate", saved_config(workdir), workdir)
    names = ("4", "6", "average:2")
    params = {which: load(dataclasses.replace(request, checkpoint=which)).params for which in names}
    capsys.readouterr()
    means = jax.tree.map(lambda a, b: (a + b) / 2, params["4"], params["6"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params["average:2"], means
    )
    said = run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=evaluate", "--checkpoint=average:2"])
    assert f"average:2, to update 6 of {workdir}" in said
    probed = ["--config.evaluate.probes=position", "--mode=evaluate", "--checkpoint=average:2"]
    assert "is an average of several; set evaluate.probes" in refuse(
        capsys, ["llmjax", f"--workdir={workdir}", *probed]
    )
    begins = {"checkpoint__init_from": workdir, "checkpoint__init_checkpoint": "average:2"}
    begun = run(capsys, command(folder, f"--workdir={tmp_path / 'begun'}", train__num_updates=0, **begins))
    assert "beginning with the parameters of the mean (average:2) to update 6 of" in begun
    further = command(folder, f"--workdir={tmp_path / 'on'}", "--mode=evaluate", **begins)
    assert (
        re.search(r"held-out loss +(\S+)", said)[1]
        == re.search(r"held-out loss +(\S+)", run(capsys, further))[1]
    )


def test_names_that_do_not_exist_are_refused_before_text_is_read(folder, tmp_path, capsys):
    said = refuse(capsys, tuned(folder, tmp_path / "run", lora__targets="wz", data__sources=folder / "base"))
    assert "lora.targets has 'wz', which names no parameter that it can have; use some of layers" in said
    adapters = tmp_path / "adapters"
    assert convert.main(["--from", "llmjax", "--to", "peft", str(folder / "run"), str(adapters)]) == 0
    fewer = {"lora__targets": "attention", "lora__init_from": adapters, "data__sources": folder / "base"}
    said = refuse(capsys, tuned(folder, tmp_path / "run", **fewer))
    assert (
        "has the tensor 'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'; let lora.targets" in said
    )


def test_adapters_go_to_a_folder_of_peft_and_come_back_equal(folder, tmp_path, capsys):
    adapters, again = tmp_path / "adapters", tmp_path / "again"
    assert convert.main(["--from", "llmjax", "--to", "peft", str(folder / "run"), str(adapters)]) == 0
    began = tuned(folder, tmp_path / "begun", train__num_updates=0, lora__init_from=adapters)
    assert main.main(began) == 0
    assert last_loss(tmp_path / "begun") == pytest.approx(last_loss(folder / "run"), rel=1e-6)
    assert convert.main(["--from", "llmjax", "--to", "peft", str(tmp_path / "begun"), str(again)]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (adapters / name).read_bytes() == (again / name).read_bytes()
    # Without a run, other modes use the adapters too.
    words = tuned(folder, tmp_path / "none", "--mode=evaluate", lora__init_from=adapters)
    capsys.readouterr()
    assert held_out(capsys, words) == last_loss(folder / "run")
    # A run that has begun needs its adapters no more.
    adapters.rename(tmp_path / "moved")
    capsys.readouterr()
    run(capsys, [*began, "--config.train.num_updates=1"])
    run(capsys, ["llmjax", f"--workdir={tmp_path / 'begun'}", "--config.lora.init_from=", "--mode=plan"])
    adapters = (tmp_path / "moved").rename(adapters)
    said = run(
        capsys,
        tuned(folder, tmp_path / "twice", train__num_updates=0, lora__init_from=adapters,
              checkpoint__init_from=folder / "run"),
    )  # fmt: skip
    assert (
        "has adapters of its own, which are in its matrices now" in said
        and "beginning with the adapters in" in said
    )
    said = refuse(capsys, tuned(folder, tmp_path / "other", lora__init_from=adapters, lora__alpha=3.0))
    assert "lora.alpha=3.0, but" in said
    assert convert.main(["--from", "llmjax", "--to", "peft", str(folder / "base"), str(tmp_path / "no")]) == 2
    assert (
        "lora.rank=0 has no adapters to convert" in capsys.readouterr().err and not (tmp_path / "no").exists()
    )


def test_a_run_without_better_scores_ends_early_as_a_finished_one(folder, tmp_path, capsys):
    # With a learning rate of 0 no score becomes better.
    settings = {
        "train__num_updates": 9,
        "evaluate__every": 1,
        "checkpoint__every": 4,
        "optimizer__learning_rate": 0.0,
    }
    words = command(
        folder, f"--workdir={tmp_path}", train__patience=2, **settings, optimizer__layer_decay=0.5
    )
    said = run(capsys, words)
    assert (
        "the held-out loss has not become better in 2 evaluations in a row" in said and "done after" in said
    )
    assert len(tiny_run.losses(tmp_path)) == 3 and (tmp_path / "checkpoints" / "3").is_dir()
    assert "--mode=evaluate --checkpoint=best" in said and "best held-out loss" in said
    assert (
        "--config.train.patience=4" in said and "--config.train.num_updates" not in said.split("\nnext\n")[1]
    )
    assert "no score was better in the last 2 of train.patience=2; set it to 4 to go on" in run(capsys, words)
    run(capsys, [*words, "--config.train.patience=4"])
    assert len(tiny_run.losses(tmp_path)) == 5


@pytest.mark.parametrize("changes, message", [
    ({"train__patience": 2, "evaluate__every": 0}, "train.patience=2 counts evaluations, and evaluate.every=0 m"),
    ({"train__patience": 2, "data__held_out_fraction": 0.0}, "train.patience=2 counts evaluations on held-out text"),
    ({"optimizer__layer_decay": 0.5, "model__family": "lstm"}, "optimizer.layer_decay=0.5 needs a stack of layers"),
])  # fmt: skip
def test_what_would_have_no_effect_is_refused(folder, tmp_path, capsys, changes, message):
    assert message in refuse(capsys, command(folder, f"--workdir={tmp_path / 'run'}", **changes))


def test_a_classifier_of_adapters_trains_its_head_and_labels_texts(tmp_path, capsys):
    test_classify.write_table(tmp_path / "corpus", test_classify.texts_of())
    settings = {"lora__rank": 2, "model__family": "gpt", "train__num_updates": 8}
    words = test_classify.command(tmp_path, f"--workdir={tmp_path / 'run'}", **settings)
    assert main.main(words) == 0
    held = (tmp_path / "run" / "checkpoints" / "8" / "state" / "_METADATA").read_text()
    assert "'classifier', 'w_CD'" in held and "embedding_VD" not in held
    assert "note: lora.rank=2 freezes parameters that nobody has trained" in capsys.readouterr().out
    said = run(
        capsys, ["llmjax", f"--workdir={tmp_path / 'run'}", "--mode=classify", "--prompt=river stone!"]
    )
    assert "loud" in said or "quiet" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_family_resumes_and_is_evaluated_with_adapters(tmp_path, name, capsys):
    if name == "encoder_decoder":
        tiny_run.write_pairs(tmp_path / "corpus")
    else:
        tiny_run.write_corpus(tmp_path / "corpus", text=tiny_run.CHINESE)
    settings = settings_of(name, lora__rank=2, optimizer__schedule_updates=6)
    assert main.main(command(tmp_path, f"--workdir={tmp_path / 'whole'}", **settings)) == 0
    for updates in (3, 6):
        words = command(tmp_path, f"--workdir={tmp_path / 'cut'}", **settings, train__num_updates=updates)
        assert main.main(words) == 0
    assert tiny_run.losses(tmp_path / "cut") == tiny_run.losses(tmp_path / "whole")
    capsys.readouterr()
    assert held_out(capsys, [*words, "--mode=evaluate"]) == last_loss(tmp_path / "cut")


def test_an_update_that_was_stopped_between_micro_steps_goes_on_there(folder, tmp_path, capsys, monkeypatch):
    polls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr("llmjax.train.loop.stop_request.StopRequest.poll", lambda self: next(polls) == 2)
        assert main.main(tuned(folder, tmp_path)) == 75
    assert "micro-steps of the next and saved" in capsys.readouterr().out
    held = next((tmp_path / "partial_update").glob("*/state/_METADATA")).read_text()
    assert "'acc_grads'" in held and "embedding_VD" not in held
    assert main.main(tuned(folder, tmp_path)) == 0
    assert tiny_run.losses(tmp_path) == tiny_run.losses(folder / "run")


def test_a_spike_takes_a_run_back_to_its_adapters_and_its_base(folder, tmp_path):
    # Without learning, the loss of each batch lies above or below the level of those before.
    spikes = {"stability__on_spike": "rewind", "stability__threshold": 1e-6, "stability__warmup_updates": 10}
    assert main.main(
        tuned(folder, tmp_path, train__num_updates=20, optimizer__learning_rate=0.0, **spikes)
    ) in (0, 1)
    events = [line for line in tiny_run.read_lines(tmp_path) if line.get("event") == "rewind"]
    assert events and "back from update" in events[0]["text"]
