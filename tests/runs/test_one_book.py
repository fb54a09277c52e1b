"""A run on one book holds out its end and goes on bit for bit, as do runs from before documents could be cut."""

import json
import shutil

import pytest
import tiny_run
from some_slow import often
from tiny_run import command, losses, read_lines

from llmjax import main

# At this fraction the hash holds out the first of the two documents, as a run from before data.hold_out does.
OLD = {"data__held_out_fraction": 0.4}


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """These runs are of one and the same program."""
    with tiny_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def book(words, start=0):
    return " ".join(f"{tiny_run.WORDS[i % 12]}{i}" for i in range(start, start + words)) + "\n"


@pytest.fixture
def folder(tmp_path):
    """A book, and beside it a folder with two."""
    (tmp_path / "book.txt").write_text(book(3000))
    (tmp_path / "corpus").mkdir()
    for name, text in {"a": book(2000), "b": book(1000, 3)}.items():
        (tmp_path / "corpus" / f"{name}.txt").write_text(text)
    return tmp_path


def run(folder, name, *words, **settings):
    return main.main(command(folder, f"--workdir={folder / name}", *words, **settings))


@pytest.mark.parametrize(
    "settings",
    often(
        [{}, {"data__hold_out": "tails"}, {"data__split_on": "river\\d+0 "}], lambda settings: not settings
    ),
    ids=str,
)
def test_a_run_on_one_book_holds_out_a_part_says_so_and_goes_on_bit_for_bit(folder, settings, capsys):
    settings = {"data__sources": folder / "book.txt", **settings}
    assert run(folder, "whole", **settings) == 0
    out = capsys.readouterr().out
    assert "held out   " in out and "bits per byte" in out
    tails = "held out   the last 10% of the characters of each document: "
    assert (tails in out) == (list(settings) != ["data__sources", "data__split_on"])
    assert run(folder, "stopped", **settings, train__num_updates=2, optimizer__schedule_updates=6) == 0
    assert run(folder, "stopped", **settings, optimizer__schedule_updates=6) == 0
    assert losses(folder / "stopped") == losses(folder / "whole")
    lines = [read_lines(folder / name) for name in ("whole", "stopped")]
    evaluated = [[line for line in each if line["kind"] != "train"][-1] for each in lines]
    assert evaluated[0] == evaluated[1]
    assert run(folder, "whole", "--mode=evaluate", **settings) == 0


@pytest.mark.parametrize(
    "with_config", often([True, False], lambda given: given), ids=["same command", "workdir alone"]
)
def test_a_run_from_before_data_could_be_cut_goes_on_bit_for_bit(folder, with_config, capsys):
    """Its config lacks the keys, and whole documents are held out, few as they are."""
    assert run(folder, "whole", **OLD, data__hold_out="documents") == 0
    first = {**OLD, "train__num_updates": 4, "optimizer__schedule_updates": 6}
    assert run(folder, "old", **first, data__hold_out="documents") == 0
    path = folder / "old" / "config.json"
    config = json.loads(path.read_text())
    for key in ("hold_out", "held_out_sources", "split_on"):
        del config["data"][key]
    path.write_text(json.dumps(config))
    shutil.copytree(folder / "old", folder / "plan")
    capsys.readouterr()
    if with_config:
        again = {**OLD, "optimizer__schedule_updates": 6}
        assert run(folder, "plan", "--mode=plan", **again) == 0
        out = capsys.readouterr().out
        assert "1 of 2 documents, whole" in out and "does not go on" not in out
        assert run(folder, "old", **again) == 0
    else:
        words = ["llmjax", f"--workdir={folder / 'old'}", "--config.train.num_updates=6"]
        assert main.main(words) == 0
    assert "1 of 2 documents, whole" in capsys.readouterr().out
    assert losses(folder / "old") == losses(folder / "whole")
    assert json.loads(path.read_text())["data"]["hold_out"] == "documents"


def test_what_a_run_holds_out_does_not_change_under_way(folder, capsys):
    assert run(folder, "run", train__num_updates=2) == 0
    capsys.readouterr()
    assert run(folder, "run", data__hold_out="documents", **OLD) == 2
    assert "data.hold_out ('auto' there, 'documents' here)" in capsys.readouterr().err
