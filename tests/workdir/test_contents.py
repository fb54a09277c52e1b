"""The files that people and later commands read."""

import json
import os
import shlex

import pytest

from llmjax.errors import UserError
from llmjax.files import write_atomically
from llmjax.workdir.contents import commands, last_sample, saved_config, write_json, write_samples


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, "old")
    write_atomically(path, "new, 新")
    assert path.read_text(encoding="utf-8") == "new, 新"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_file_keeps_its_content_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_saved_config_is_read_back(tmp_path):
    assert saved_config(tmp_path) is None
    write_json(tmp_path / "config.json", {"data": {"sources": ["诗.txt"]}, "lr": 3e-4})
    assert saved_config(tmp_path) == {"data": {"sources": ["诗.txt"]}, "lr": 3e-4}
    assert "诗" in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text, what", [('{"seed": 0,', "is not JSON"), ("null", "but a NoneType"), ("", "is not JSON")]
)
def test_a_saved_config_that_cannot_be_read_is_named(text, what, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=what) as error:
        saved_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


HARD = "a\n```\nfence ```` inside\n<!-- update 5 in a line -->\n\n"


def test_samples_of_any_text_are_read_back(tmp_path):
    path = tmp_path / "samples.md"
    assert last_sample(path) is None
    for prompt, continuation in (("import ", "os\n"), (HARD, HARD), ("", ""), ("春江", "潮水")):
        write_samples(path, 1, [(prompt, continuation)])
        assert last_sample(path) == (prompt, continuation)


def test_samples_are_added_and_those_made_again_are_replaced(tmp_path):
    path, straight = tmp_path / "samples.md", tmp_path / "straight.md"
    for update in (100, 200, 300):
        write_samples(path, update, [(HARD, f"before {update}")])
    for update in (200, 300):  # resumed from 100
        write_samples(path, update, [("p", f"after {update}")])
    write_samples(straight, 100, [(HARD, "before 100")])
    for update in (200, 300):
        write_samples(straight, update, [("p", f"after {update}")])
    assert path.read_text() == straight.read_text()
    assert last_sample(path) == ("p", "after 300")


def test_the_commands_can_be_pasted_into_a_shell(tmp_path):
    workdir = tmp_path / "a name"
    texts = commands(workdir, 400, "it's")
    assert set(texts) == {"resume", "train on", "evaluate", "generate", "report"}
    for label in ("resume", "train on", "evaluate", "generate"):
        words = shlex.split(texts[label])
        assert words[1:4] == ["-m", "llmjax.main", f"--workdir={workdir}"], label
    assert "--config.train.num_updates=800" in texts["train on"]
    assert shlex.split(texts["report"])[-1] == str(workdir / "report.html")
    assert shlex.split(texts["generate"])[-1] == "--prompt=it's"
    assert json.dumps(texts)


def test_samples_that_others_damaged_stop_nothing_and_stay(tmp_path):
    path = tmp_path / "samples.md"
    write_samples(path, 2, [("a", "b")])
    damage = b"\xff\xfe bytes\r\n<!-- update " + b"9" * 5000 + b" -->\n\0\n````\n"
    path.write_bytes(path.read_bytes() + damage)
    write_samples(path, 4, [("c", "d\udcff")])
    assert damage in path.read_bytes() and b"<!-- update 4 -->" in path.read_bytes()
    assert last_sample(path) == ("c", "d?")
    path.write_bytes(b"\xff```text\n\xff\n```\n")
    assert last_sample(path) is None
