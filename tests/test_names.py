"""Names that are not UTF-8, and names with codes that a terminal obeys, end no run and are printed escaped."""

import json
import os
import shlex
import subprocess

import pytest
import tiny_run

from llmjax import flags, main
from llmjax.build.corpus import make_corpus
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.records import read_records
from llmjax.names import is_unicode, plain_name, quote
from llmjax.workdir.contents import saved_config, write_json

NAMES = {
    "plain.txt": "plain.txt",
    "诗 é\u3000.txt": "诗 é\u3000.txt",
    "\udcff\udce9.txt": r"\xff\xe9.txt",
    "new\nline.txt": r"new\nline.txt",
    "\x1b[2J.txt": r"\x1b[2J.txt",
    "\x9b\x07\x7f.txt": r"\x9b\x07\x7f.txt",
    "left\u202eright\u2028.txt": r"left\u202eright\u2028.txt",
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_printed_on_one_line_and_can_be_encoded(name):
    assert plain_name(name) == NAMES[name]
    assert plain_name(name).encode() and len(plain_name(name).splitlines()) == 1


@pytest.mark.parametrize("name", [*NAMES, "it's a $HOME \\"], ids=ascii)
@pytest.mark.parametrize("shell", ["bash"])
def test_a_quoted_name_is_one_word_of_a_shell_on_one_line(name, shell):
    assert quote(name).splitlines() == [quote(name)] and is_unicode(quote(name))
    printed = subprocess.run(
        [shell, "-c", f"printf %s {quote(name)}"], capture_output=True, check=True
    ).stdout
    assert printed == os.fsencode(name)
    if name.isprintable():
        assert quote(name) == shlex.quote(name)


@pytest.fixture
def folder(tmp_path):
    """A corpus of files with such names, in a folder with such a name."""
    folder = tmp_path / "a\udcff\n\x1b"
    corpus = tiny_run.write_corpus(folder / "corpus")
    for name in NAMES:
        (corpus / name).write_text(f"of all names {name!a} is the best, " * 20)
    (corpus / "rows\udcff.jsonl").write_text(json.dumps({"text": "a row " * 30}) + "\n")
    return folder


def test_documents_of_every_name_are_read_stored_and_named(folder):
    words = tiny_run.command(folder, data__held_out_fraction=0.2)
    config, derived = resolve_config(read_config(flags.parse(words)[1]), 1)
    for _ in range(2):  # the second time from the cache
        corpus = make_corpus(config, derived)
        rows = list(range(corpus.train_plan.num_rows))
        named = {name for name, _, _ in corpus.train.documents(rows)}
        stored = {corpus.store.name(i) for i in range(len(corpus.store))}
        assert set(NAMES) <= stored and r"rows\xff.jsonl#1" in {plain_name(name) for name in stored}
        assert named <= {plain_name(name) for name in stored} and len(named) > 30
        assert corpus.train_text(0, len(rows)).encode().count(b"\n## ") >= len(named) - 1


def test_a_saved_config_keeps_every_name(folder, tmp_path):
    config = {"data": {"sources": [str(folder / name) for name in NAMES]}}
    write_json(tmp_path / "config.json", config)
    assert saved_config(tmp_path) == config


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "jsonl.gz"])
def test_every_format_is_read_from_a_file_of_any_name_and_its_mistakes_are_named(suffix, tmp_path):
    path = tmp_path / f"a\udcff\n.{suffix}"
    path.write_bytes(b'{"text": \xff')
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError) as error:
        list(read_records(*list_sources([str(path)])))
    assert (
        is_unicode(error.value) and "\n" not in str(error.value) and r"a\udcff\n" in str(error.value)
    ) or (r"a\xff\n" in str(error.value))
    if suffix == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        with path.open("wb") as file:
            parquet.write_table(pa.table({"text": ["one", "two"]}), file)
        assert [document.text for document in read_records(*list_sources([str(path)]))] == ["one", "two"]
        data = path.read_bytes()
        path.write_bytes(data[:10] + bytes(20) + data[30:])
        with pytest.raises(ValueError, match="cannot be read"):
            list(read_records(*list_sources([str(path)])))


def test_a_workdir_that_checkpoints_cannot_be_written_to_is_refused_at_once(folder, capsys):
    for words in (
        [f"--workdir={folder / 'run'}"],
        ["--workdir=x", f"--config.checkpoint.init_from={folder}"],
    ):
        assert main.main(tiny_run.command(folder, *words)) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "is not UTF-8" in err and is_unicode(err)


@pytest.mark.parametrize("words", [["--workdir=a**b"], ["--workdir=x", "--config.checkpoint.init_from=a**b"]])
def test_a_workdir_with_two_stars_is_refused_at_once(words, folder, capsys):
    assert main.main(tiny_run.command(folder, *words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "a**b" in err and " has ** in its path" in err


@pytest.mark.parametrize("key", ["data.cache_dir", "tokenizer.path", "data.sources", "checkpoint.init_from"])
def test_a_home_folder_that_is_not_known_is_one_sentence(key, folder, capsys):
    assert main.main(tiny_run.command(folder, f"--config.{key}=~nobody_of_this_name/x")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "~nobody_of_this_name/x" in err


def test_a_user_without_a_home_is_told_to_give_a_cache(folder, capsys, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: path
    )  # as where the system does not know the user
    assert main.main(tiny_run.command(folder, "--config.data.cache_dir=")) == 2
    assert "data.cache_dir" in capsys.readouterr().err


@pytest.mark.slow
def test_a_micro_step_of_such_names_that_is_left_out_is_told_and_ends_no_run(folder, tmp_path, capsys):
    settings = {"optimizer__learning_rate": 1e30, "optimizer__warmup_updates": 0, "evaluate__every": 0,
                "stability__max_skips": 2, "data__sources": folder / "corpus"}  # fmt: skip
    workdir = tmp_path / "new\nline"
    assert main.main(tiny_run.command(folder, f"--workdir={workdir}", **settings)) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "skipped or dropped" in err
    assert "was not finite and left out; by itself each document has a finite loss now; documents " in out
    assert is_unicode((workdir / "metrics.jsonl").read_text(encoding="utf-8"))


ADDRESSES = ("gs://bucket/run", "s3://bucket/run", "https://host/run", "gs:/bucket/run")


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "flag",
    ["--workdir", "--prompt_file", "--config.data.sources", "--config.data.held_out_sources", "--config.data.cache_dir",
     "--config.tokenizer.path", "--config.checkpoint.init_from"],
)  # fmt: skip
def test_an_address_in_place_of_a_path_is_refused_and_nothing_is_written(
    flag, address, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tiny_run.write_corpus(tmp_path / "corpus", 8)
    words = tiny_run.command(tmp_path, f"--workdir={tmp_path / 'work'}", f"{flag}={address}")
    if flag == "--prompt_file":
        words.append("--mode=generate")
    assert main.main(words) == 2
    err = capsys.readouterr().err
    assert flag.split(".", 1)[-1].removeprefix("config.") in err and err.count("\n") == 1
    assert "is an address and no path of this machine; mount the bucket" in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["corpus"]
