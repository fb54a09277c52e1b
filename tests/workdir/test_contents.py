"""The files that people and later commands read."""

import json
import os
import shlex

import pytest

from llmjax.errors import UserError
from llmjax.files import write_atomically
from llmjax.workdir.contents import commands, saved_config, write_json


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
