"""What may change when a run goes on: of paths, the content of what lies there decides."""

import dataclasses

import pytest
from sections import section

from configs.base import get_config
from llmjax.config import resume
from llmjax.config.reading import read_config
from llmjax.config.resume import check_resume
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.training import train_tokenizer
from llmjax.errors import UserError

LOREM = "the quick brown fox jumps over the lazy dog, 你好\n" * 20


def config_with(name, **changes):
    config = read_config(get_config().to_dict())
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **changes)})


@pytest.fixture
def folders(tmp_path):
    """A workdir, a folder that has its tokenizer, and one that has another."""
    tokenizer = train_tokenizer(section("tokenizer", vocab_size=310), [LOREM])
    for name in ("workdir/tokenizer", "moved", "moved/tokenizer"):
        tokenizer.save(tmp_path / name)
    for name in ("other", "other/tokenizer"):
        ByteTokenizer().save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name, key", [("tokenizer", "path"), ("checkpoint", "init_from")])
def test_a_path_that_moved_is_the_same_where_its_content_is(name, key, folders, monkeypatch):
    saved = config_with(name, **{key: str(folders / "gone")}).to_dict()

    def check(place):
        check_resume(saved, config_with(name, **{key: place}), str(folders / "workdir"))

    check(str(folders / "gone"))
    monkeypatch.setattr(resume, "has_begun", lambda workdir: True)
    check(str(folders / "moved"))
    for place in (str(folders / "other"), str(folders / "absent"), ""):
        with pytest.raises(UserError, match=rf"another config: {name}\.{key} \(.* there, "):
            check(place)


def test_a_run_that_has_still_to_begin_keeps_the_name_of_what_it_begins_with(folders):
    saved = config_with("checkpoint", init_from=str(folders / "gone")).to_dict()
    with pytest.raises(UserError, match=r"checkpoint\.init_from"):
        check_resume(
            saved, config_with("checkpoint", init_from=str(folders / "moved")), str(folders / "workdir")
        )


@pytest.mark.parametrize("key, value", [("follow_links", True), ("max_expansion", 9), ("sources", ("x",))])
def test_where_files_are_found_may_change_and_how_they_are_read_may_not(key, value):
    saved = config_with("data").to_dict()
    check_resume(saved, config_with("data", **{key: value}), "runs/x")
    with pytest.raises(UserError, match=r"data\.encoding"):
        check_resume(saved, config_with("data", encoding="gb18030"), "runs/x")
