"""Runs of preferences from the command line: begun, resumed, adapted, evaluated, used and begun from."""

import json
import math
import random
import re

import pytest
import tiny_run
from tiny_run import WORDS, command

from llmjax import main
from tests.modes.test_chat import talk
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture
from tests.runs.test_tuned_runs import held_out
from tools import convert

TALKS = {"task__name": "conversation", "data__seq_len": 64, "compute__accumulation_steps": 1}
TASK = TALKS | {"task__name": "preference", "data__text_field": "chosen"}
LORA = {"lora__rank": 2, "lora__targets": "attention"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for name, make in (
        ("talks", lambda one, good, bad: {"text": [one, good]}),
        ("corpus", lambda one, good, bad: {"prompt": one, "chosen": good, "rejected": bad}),
    ):
        rows = [make(" ".join(rng.choices(WORDS, k=3)), f"yes {rng.choice(WORDS)}", "no") for _ in range(300)]
        (folder / name).mkdir()
        (folder / name / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        main.main(command(folder, f"--workdir={folder / 'base'}", **TALKS, data__sources=folder / "talks"))
        == 0
    )
    assert main.main(preferring(folder, folder / "run")) == 0
    return folder


def preferring(folder, workdir, *words, **changes):
    settings = TASK | {"checkpoint__init_from": folder / "base"} | changes
    return command(folder, f"--workdir={workdir}", *words, **settings)


def first_and_last(workdir):
    losses = tiny_run.losses(workdir)
    return losses[0], losses[-1]


def held_by(workdir, name):
    return (workdir / name / "state" / "_METADATA").read_text()


def test_a_run_learns_what_is_preferred_and_remembers_where_it_began(folder):
    first, last = first_and_last(folder / "run")
    # The model is compared with itself, so that neither answer is preferred at first.
    assert first == pytest.approx(math.log(2), rel=1e-5) and last < first
    plan = json.loads((folder / "run" / "summary.json").read_text())["plan"]
    assert re.search(
        r"gpt, [\d.]+k parameters, compared with those that the run begins with, ", plan["model"]
    )
    assert "tokens of their second texts" in plan["packing"] and "cut" not in plan
    assert "reference" in held_by(folder / "run", "frozen/0")
    assert "reference" not in held_by(folder / "run", "checkpoints/6")


@pytest.mark.parametrize("engine", ["in_place", "fused"])
def test_a_run_that_is_stopped_and_resumed_has_the_losses_of_one_that_was_not(folder, tmp_path, engine):
    for updates in (3, 6):
        words = preferring(
            folder,
            tmp_path,
            train__num_updates=updates,
            compute__engine=engine,
            optimizer__schedule_updates=6,
        )
        assert main.main(words) == 0
    found, expected = tiny_run.losses(tmp_path), tiny_run.losses(folder / "run")
    assert found == (expected if engine == "in_place" else pytest.approx(expected, rel=1e-5))


def test_adapters_are_compared_with_their_matrices_which_are_kept_once(folder, tmp_path, capsys):
    settings = LORA | {"optimizer__learning_rate": 0.03}
    said = run(capsys, preferring(folder, tmp_path / "tuned", **settings))
    assert "train (adapters of rank 2 in 4 arrays)" in said and "compared with those that the run beg" in said
    first, last = first_and_last(tmp_path / "tuned")
    assert first == pytest.approx(math.log(2), rel=1e-5) and last < first
    assert "reference" not in held_by(tmp_path / "tuned", "frozen/0")
    expected = tiny_run.read_lines(tmp_path / "tuned")[-1]["loss"]
    assert held_out(capsys, ["llmjax", f"--workdir={tmp_path / 'tuned'}", "--mode=evaluate"]) == expected
    # The adapters alone, as of any other run, with which no run can begin that is compared with its beginning.
    words = ["--from", "llmjax", "--to", "peft", str(tmp_path / "tuned"), str(tmp_path / "adapters")]
    assert convert.main(words) == 0
    capsys.readouterr()
    again = LORA | {"lora__init_from": tmp_path / "adapters"}
    said = refuse(capsys, preferring(folder, tmp_path / "again", **again))
    assert "changes the model that task.name='preference' compares with" in said
    assert (
        main.main(preferring(folder, tmp_path / "odds", "--mode=plan", preference__loss="orpo", **again)) == 0
    )
    frozen = preferring(folder, tmp_path / "frozen", train__frozen="attention,layers:1")
    assert main.main(frozen) == 0
    held = held_by(tmp_path / "frozen", "frozen/0")
    assert "'reference', 'embedding'" in held and "'layers', 'attention'" in held
    assert "'reference', 'layers'" not in held


def test_a_further_run_remembers_where_it_begins_itself(folder, tmp_path):
    words = preferring(folder, tmp_path / "next", checkpoint__init_from=folder / "run", train__num_updates=1)
    assert main.main(words) == 0
    assert tiny_run.losses(tmp_path / "next")[0] == pytest.approx(math.log(2), rel=1e-5)
    # One without a reference begins with such a run, and the other way round.
    for name, start, loss in (("odds", folder / "run", "orpo"), ("back", tmp_path / "odds", "dpo")):
        words = preferring(
            folder, tmp_path / name, checkpoint__init_from=start, preference__loss=loss, train__num_updates=1
        )
        assert main.main(words) == 0
        assert (tmp_path / name / "frozen").exists() == (loss == "dpo")
    assert tiny_run.losses(tmp_path / "back")[0] == pytest.approx(math.log(2), rel=1e-5)


def test_what_reads_one_text_reads_it_with_the_model_alone(folder, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"query": "river", "choices": ["yes", "no"], "gold": 0}))
    found = []
    for workdir in (folder / "run", tmp_path / "alone"):
        if workdir != folder / "run":
            assert (
                convert.main(["--from", "llmjax", "--to", "llmjax", str(folder / "run"), str(workdir)]) == 0
            )
            capsys.readouterr()
        words = ["llmjax", f"--workdir={workdir}"]
        run(capsys, [*words, "--mode=evaluate", f"--questions={asked}"])
        items = json.loads((workdir / "questions" / "asked.json").read_text())["items"]
        found.append((items, run(capsys, [*words, "--mode=embed", "--prompt=river"])))
    assert found[0] == found[1]


def test_a_run_is_used_as_one_of_conversations(folder, tmp_path, capsys, monkeypatch):
    answer = talk(capsys, monkeypatch, folder / "run", "river stone")
    # The same model without what it remembers.
    words = ["--from", "llmjax", "--to", "llmjax", str(folder / "run"), str(tmp_path / "alone")]
    assert convert.main(words) == 0
    assert "reference" not in held_by(tmp_path / "alone", "checkpoints/0")
    capsys.readouterr()
    further = command(folder, f"--workdir={tmp_path / 'on'}", **TALKS, data__sources=folder / "talks",
                      checkpoint__init_from=folder / "run", train__num_updates=0)  # fmt: skip
    assert main.main(further) == 0
    capsys.readouterr()
    assert talk(capsys, monkeypatch, tmp_path / "on", "river stone") == answer


@pytest.mark.parametrize("rows, message", [
    ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "rows.jsonl#1: both answers of a pair are 'b', so that"),
    ([{"prompt": "a", "chosen": ["b"], "rejected": "c"}], 'is a list of texts that does not say who says them; wri'),
    ([{"prompt": "a", "chosen": "b"}], "'rejected' is missing in"),
    ([{"prompt": "a", "chosen": "b" * 80, "rejected": "c"}] * 2, "data.seq_len=64 is too short for 2 of 2 documents"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence(tmp_path, capsys, rows, message):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refuse(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}", **TASK))
    assert message in said
