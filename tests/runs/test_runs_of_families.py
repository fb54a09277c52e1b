"""Runs of every family but the GPT from the command line: trained, stopped, resumed, evaluated, continued in text."""

import pytest
import tiny_run
from families import task_for
from tiny_run import command

from llmjax import main
from llmjax.models.table import FAMILIES
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

# What is tried -> its family. A mixture of experts is a GPT with other layers.
OTHERS = {**{name: name for name in FAMILIES if name != "gpt"}, "experts": "gpt"}


def settings_of(name, **changes):
    """What a command for a name of `OTHERS` sets, with `changes`."""
    experts = {"experts__num_experts": 2, "experts__expert_dim": 16} if name == "experts" else {}
    return {"model__family": OTHERS[name], "task__name": task_for(OTHERS[name]), **experts, **changes}


@pytest.fixture(scope="module", params=OTHERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    folder = tmp_path_factory.mktemp(family)
    if FAMILIES[OTHERS[family]].reads_source:
        tiny_run.write_pairs(folder / "corpus")
    else:
        tiny_run.write_corpus(folder / "corpus", text=tiny_run.CHINESE)
    return folder


@pytest.fixture(scope="module")
def trained(folder, family):
    assert main.main(command(folder, f"--workdir={folder / 'run'}", **settings_of(family))) == 0
    return folder / "run"


def test_a_run_that_is_stopped_and_resumed_has_the_losses_of_one_that_was_not(
    folder, trained, family, tmp_path
):
    for updates in (3, 6):
        settings = settings_of(family, train__num_updates=updates, optimizer__schedule_updates=6)
        assert main.main(command(folder, f"--workdir={tmp_path}", **settings)) == 0
    assert tiny_run.losses(tmp_path) == tiny_run.losses(trained)


def test_it_is_evaluated_and_continues_texts_in_every_language(folder, trained, family, capsys):
    said = run(capsys, command(folder, f"--workdir={trained}", "--mode=evaluate", **settings_of(family)))
    assert "held-out loss" in said
    if FAMILIES[OTHERS[family]].sees_both_sides:
        said = refuse(capsys, ["llmjax", f"--workdir={trained}", "--mode=generate", "--prompt=春江 stone"])
        assert "task.name='masked_language_model' fills in masks and continues no text" in said
        return
    if FAMILIES[OTHERS[family]].reads_source:
        said = refuse(capsys, ["llmjax", f"--workdir={trained}", "--mode=generate", "--prompt=春江 stone"])
        assert "writes a text after it has read another, and continues none; use --mode=translate" in said
        return
    said = run(capsys, ["llmjax", f"--workdir={trained}", "--mode=generate", "--prompt=春江 stone"])
    assert "春江 stone" in said


def test_a_plan_says_the_family_and_its_cost(folder, family, capsys):
    said = run(capsys, command(folder, f"--workdir={folder / 'plan'}", "--mode=plan", **settings_of(family)))
    assert f"{OTHERS[family]}, " in said and "FLOP per token" in said


def test_no_run_begins_with_the_parameters_of_another_family(folder, trained, family, tmp_path, capsys):
    said = refuse(capsys, command(folder, f"--workdir={tmp_path}", checkpoint__init_from=trained))
    key = {"experts": "experts.num_experts=0"}.get(family, "model.family='gpt'")
    assert key in said and f"the run in checkpoint.init_from='{trained}' has" in said
