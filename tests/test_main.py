"""The command line as a user types it: what is understood, and what every mistake gets: one sentence, exit code 2, and
nothing compiled."""

import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import tiny_run
from tiny_run import BASE, command

from configs import base
from llmjax import main
from llmjax.errors import UserError

REFUSED = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus and some files that are none."""
    folder = tmp_path_factory.mktemp("main")
    tiny_run.write_corpus(folder / "corpus")
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("one short text")
    (folder / "latin1.txt").write_bytes(b"x" * 400 + "é".encode("latin-1") + b" and more" * 300)
    (folder / "nonsense.model").write_text("no model")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    """A mistake is found before any program is made."""

    def make_program(*args, **kwargs):
        raise AssertionError("a program was made")

    tiny_run.replace_in_modes(monkeypatch, "make_program", make_program)


def refuse(capsys, arguments):
    """The sentence with which `arguments` are refused."""
    assert main.main(arguments) == REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("llmjax: "), err
    return err.removeprefix("llmjax: ").strip()


MISTAKES = {
    "section": (["--config.modle.num_layers=2"],
                "--config.modle.num_layers ", "did you mean --config.model.num_layers?"),
    "key": (["--config.model.num_layer=2"], "--config.model.num_layer ", "did you mean --config.model.num_layers?"),
    "top": (["--config.sed=2"], "--config.sed ", "did you mean --config.seed?"),
    "wrong section": (["--config.train.seq_len=64"], "--config.train.seq_len", "--config.data.seq_len?"),
    "bare key": (["--config.num_layers=2"], "--config.num_layers", "did you mean --config.model.num_layers?"),
    "nothing like it": (["--config.zzz=2"], "--config.zzz is not known", "configs/base.py"),
    "no value": (["--config.seed"], "--config.seed has no value", "--config.seed=VALUE"),
    "a section": (["--config.model=4"], "--config.model is a section", "--config.model.dropout"),
    "int": (["--config.model.num_layers=two"], "--config.model.num_layers=two is not a whole number", "such as 4"),
    "fraction": (["--config.model.num_layers=2.5"], "num_layers=2.5 is not a whole number", "such as 4"),
    "nothing": (["--config.model.num_layers="], "--config.model.num_layers= is not a whole number", "such as 4"),
    "bool": (["--config.transformer.qk_norm=maybe"], "--config.transformer.qk_norm=maybe is not true or false",
    "such as true"),
    "float": (["--config.optimizer.learning_rate=high"], "learning_rate=high is not a number", "give one, such as 0."),
    "choice": (["--config.transformer.norm=batch"], "transformer.norm='batch'", "rmsnorm, layernorm"),
    "heads": (["--config.transformer.num_heads=3"], "transformer.num_heads=3 does not divide model.model_dim=16",
    "change one"),
    "seq": (["--config.mesh.data=1", "--config.mesh.seq=8", "--config.data.seq_len=60",
             "--config.train.tokens_per_update=960"], "data.seq_len=60 is not divisible by mesh.seq=8", "change one"),
    "mesh": (["--config.mesh.data=3"], "takes 3 devices but there are 8", "mesh.data=-1"),
    "tokens": (["--config.train.tokens_per_update=500"],
               "train.tokens_per_update=500 is not a multiple of data.seq_len=32", "use for example 480"),
    "product": (["--config.compute.micro_batch_size=5"],
                "compute.micro_batch_size=5 x compute.accumulation_steps=2 makes 10 sequences",
                "set one of the two to 0"),
    "shards": (["--config.compute.accumulation_steps=4"],
              "compute.micro_batch_size=4 is not divisible by the 8 shards", "change it"),
    "mode": (["--mode=trian"], "--mode=trian", "train|evaluate|generate|chat|translate|classify|embed|serve|plan"),
    "flag": (["--wrkdir=x"], "--wrkdir is no flag", "did you mean --workdir?"),
    "word": (["train"], "'train' is not a flag", "--name=value"),
    "prompts": (["--mode=generate", "--prompt_file=/nowhere.txt"],
               "--prompt_file=/nowhere.txt does not exist", "one prompt a line"),
    "prompt": (["--prompt=hello"], "--prompt is not heeded by --mode=train", "or give --mode=generate"),
    "wandb": (["--config.metrics.wandb=yes"], "metrics.wandb='yes' is not known", "online, offline"),
    "profile": (["--profile=2"], "--profile=2 is not FIRST:END", "such as 100:110"),
    "profile of 0": (["--profile=0:2"], "--profile=0:2 begins at update 0", "counted from 1"),
    "profile of none": (["--profile=5:5"], "--profile=5:5 names no update", "--profile=5:15 has ten"),
    "profile beyond": (["--profile=5:8"], "--profile=5:8 asks for update 7, and train.num_updates=6",
                       "name updates of the run"),
    "profile elsewhere": (["--mode=plan", "--profile=1:2"], "--profile is not heeded by --mode=plan",
                          "or give --mode=train"),
    "interactive": (["--interactive"], "--interactive is not heeded by --mode=train", "or give --mode=generate"),
    "empty workdir": (["--workdir="], "--workdir= is empty", "leave it out for runs/NAME"),
    "prompt that is no text": (["--mode=generate", "--prompt=a\udcff"], "--prompt=a\\xff is not UTF-8", "give text in"),
    "boolean flag": (["--interactive=maybe"], "--interactive=maybe is not true or false", "such as true"),
    "checkpoint": (["--mode=plan", "--checkpoint=latest"], "--checkpoint is not heeded by --mode=plan",
                   "or give --mode=evaluate or --mode=generate"),
    "topology": (["--mode=plan", "--config.plan.topology=v5p:4x4x5x6"],
                "plan.topology='v5p:4x4x5x6'", "such as v5p:4x4x4"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it_and_the_remedy(name, folder, tmp_path, capsys):
    words, what, remedy = MISTAKES[name]
    sentence = refuse(capsys, command(folder, f"--workdir={tmp_path / 'run'}", *words))
    assert what in sentence and remedy in sentence, sentence
    assert not (tmp_path / "run").exists()


DATA = {
    "missing": ("absent.txt", {}, "absent.txt', which does not exist", "check the path"),
    "no match": ("[ab]*.none", {}, "[ab]*.none', which matches no file", "check the pattern"),
    "empty folder": ("empty", {}, "empty', a directory without text", "name the files themselves"),
    "empty file": ("empty.txt", {}, "no document with text (1 files, 1 documents empty, 0 skipped)", "name sources"),
    "nothing held out": ("short.txt", {"data__held_out_fraction": 1e-9, "data__hold_out": "documents"},
                         "data.held_out_fraction=1e-09 holds out none of the 1 documents", "raise it"),
    "no expression": ("absent.txt", {"data__split_on": "第(.*回"},
                      "data.split_on='第(.*回' is no regular expression", "correct it"),
    "everywhere": ("absent.txt", {"data__split_on": "x*"}, "data.split_on='x*' matches the empty text", "write what"),
    "no way": ("absent.txt", {"data__hold_out": "tail"}, "data.hold_out='tail' must be one of", "documents, tails"),
    "nothing to hold out": ("short.txt", {"data__held_out_sources": "absent.txt"},
                            "data.held_out_sources names 'absent.txt', which does not exist", "check the path"),
    "too small": ("short.txt", {"data__held_out_fraction": 0.0},
                  "1 sequences of data.seq_len=32, fewer than the 16 of one update", "add documents"),
    "not UTF-8": ("latin1.txt", {}, "latin1.txt' is not UTF-8 at byte 400", "set skip or replace"),
    "all skipped": ("latin1.txt", {"data__on_bad_text": "skip"}, "0 documents empty, 1 skipped", "name sources"),
    "no tokenizer": ("corpus", {"tokenizer__path": "/nowhere.model"}, "tokenizer '/nowhere.model'", "name a"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_a_corpus_that_will_not_do_is_named(name, folder, tmp_path, capsys):
    source, settings, what, remedy = DATA[name]
    words = command(folder, f"--workdir={tmp_path / 'run'}", data__sources=folder / source, **settings)
    sentence = refuse(capsys, words)
    assert what in sentence and remedy in sentence, sentence
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_tokenizer_is_named(folder, tmp_path, capsys):
    path = folder / "nonsense.model"
    sentence = refuse(capsys, command(folder, f"--workdir={tmp_path}", tokenizer__path=path))
    assert f"tokenizer '{path}' cannot be read as a SentencePiece model" in sentence


def a_run(workdir, **changes):
    """A workdir as a run of the base config leaves it."""
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    saved = config.to_dict() | {"data": config.data.to_dict() | {"sources": ["stdlib"]}}
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(saved))
    return workdir


@pytest.mark.parametrize("mode", ["evaluate", "generate"])
def test_without_a_run_there_is_nothing_to_evaluate_or_generate_from(mode, folder, tmp_path, capsys):
    sentence = refuse(capsys, command(folder, f"--mode={mode}", f"--workdir={tmp_path}"))
    assert f"--workdir={tmp_path} holds no run" in sentence and "train there first" in sentence


def test_a_damaged_saved_config_is_named(folder, tmp_path, capsys):
    path = a_run(tmp_path) / "config.json"
    for text, what in ((path.read_text()[:500], "is not JSON"), ("[1, 2]", "holds no config but a list")):
        path.write_text(text)
        for words in (command(folder, f"--workdir={tmp_path}"), ["llmjax", f"--workdir={tmp_path}"]):
            sentence = refuse(capsys, words)
            assert f"{path} {what}" in sentence and "restore it or use another --workdir" in sentence


def test_a_workdir_of_another_run_is_refused_by_key(tmp_path, capsys):
    workdir = a_run(
        tmp_path, **{"mesh.data": 1, "model.num_layers": 5, "seed": 7, "train.tokens_per_update": 8192}
    )
    settings = ("--config.model.num_layers=4", "--config.train.tokens_per_update=8192")
    for mode in ("train", "evaluate", "generate"):
        words = ["llmjax", BASE, f"--mode={mode}", f"--workdir={workdir}", *settings]
        sentence = refuse(capsys, words)
        assert "model.num_layers (5 there, 4 here), seed (7 there, 0 here)" in sentence
        assert (
            "mesh" not in sentence
            and f"or another --workdir, which --config.checkpoint.init_from={workdir} lets" in sentence
        )


def test_a_typo_beside_a_workdir_alone_is_named_too(tmp_path, capsys):
    sentence = refuse(capsys, ["llmjax", f"--workdir={a_run(tmp_path)}", "--config.train.num_update=9"])
    assert "did you mean --config.train.num_updates?" in sentence


def test_neither_config_nor_workdir_says_what_to_try(tmp_path, capsys):
    assert "try --config=configs/base.py" in refuse(capsys, ["llmjax"])
    sentence = refuse(capsys, ["llmjax", f"--workdir={tmp_path}"])
    assert f"--workdir={tmp_path} holds no config.json and --config is not given" in sentence


def test_a_cache_that_is_a_file_is_refused(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused = refuse(
        capsys, tiny_run.command(folder, f"--workdir={tmp_path / 'run'}", data__cache_dir=tmp_path / "file")
    )
    assert str(tmp_path / "file") in refused and "give another path" in refused


def test_a_workdir_that_is_a_file_is_refused(folder, capsys):
    sentence = refuse(capsys, command(folder, f"--workdir={folder / 'short.txt'}"))
    assert "short.txt is a file" in sentence


GET = "from configs import base\ndef get_config():\n    c = base.get_config()\n"
CONFIG_FILES = {
    "def get_config(:": "fails with SyntaxError",
    "import nothing_of_this_name": "fails with ModuleNotFoundError",
    "x = 1": "fails with KeyError ('get_config')",
    "def get_config(): pass": "returns a NoneType",
    f"{GET}    c.model.num_layer = 3\n    return c":
        "sets the key 'num_layer', which is not known; did you mean 'num_layers'?",
    f"{GET}    c.model.num_layers = 'four'\n    return c":
        "fails with TypeError",
}  # fmt: skip


@pytest.mark.parametrize("text", CONFIG_FILES, ids=CONFIG_FILES.values())
def test_a_config_file_that_fails_is_one_sentence(text, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    sentence = refuse(capsys, ["llmjax", f"--config={path}"])
    assert f"--config={path} {CONFIG_FILES[text]}" in sentence
    assert "does not exist" in refuse(capsys, ["llmjax", f"--config={tmp_path / 'absent.py'}"])


def test_prompts_must_be_text(folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"good\n\xff")
    sentence = refuse(capsys, command(folder, "--mode=generate", f"--prompt_file={path}"))
    assert f"--prompt_file={path} is not UTF-8 at byte 5" in sentence


def parsed(*words):
    return main.parse(["llmjax", BASE, *words])


def test_what_is_not_said_is_as_in_the_config_file():
    values, config = parsed()
    assert config == base.get_config().to_dict()
    assert (values.mode, values.workdir, values.checkpoint) == ("train", None, "latest")
    assert main.name_of(values.config) == "base"


def test_every_type_of_value_can_be_set():
    words = ["--config.seed=3", "--config.compute.scan_layers=True", "--config.transformer.qk_norm=false",
             "--config.optimizer.learning_rate=1e-4", "--config.tokenizer.train_bytes=1_000", "-config.mesh.data=-1",
             "--config.transformer.norm", "layernorm", "--config.plan.topology="]  # fmt: skip
    _, config = parsed(*words)
    assert config["seed"] == 3 and config["mesh"]["data"] == -1 and config["plan"]["topology"] == ""
    assert config["compute"]["scan_layers"] is True and config["transformer"]["qk_norm"] is False
    assert config["transformer"]["norm"] == "layernorm"
    assert config["optimizer"]["learning_rate"] == 1e-4 and config["tokenizer"]["train_bytes"] == 1000


def test_of_a_value_the_last_counts_and_of_a_list_all():
    _, config = parsed("--config.seed=1", "--config.seed=2")
    assert config["seed"] == 2
    for words in (["a.txt,b.txt"], ["a.txt", "b.txt"], ["('a.txt', 'b.txt')"], ["['a.txt','b.txt']"]):
        _, config = parsed(*(f"--config.data.sources={word}" for word in words))
        assert main_sources(config) == ("a.txt", "b.txt")
    _, config = parsed("--config.data.sources=[ab]*.txt")
    assert main_sources(config) == ("[ab]*.txt",)


def main_sources(config):
    from llmjax.config.reading import read_config

    return read_config(config).data.sources


def test_a_name_with_commas_or_brackets_is_a_name_where_such_a_file_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "(1,2)", "['x']", "1,2", "d[1].txt"):
        (tmp_path / name).write_text("x")
        _, config = parsed(f"--config.data.sources={name}")
        assert main_sources(config) == (name,)
    _, config = parsed("--config.data.sources=1,2,c.txt", "--config.data.sources=('a,b.txt', 'e')")
    assert main_sources(config) == ("1,2", "c.txt", "a,b.txt", "e")
    _, config = parsed("--config.data.sources=3,4")
    assert main_sources(config) == ("3", "4")


def test_prompts_come_from_standard_input_and_from_files_with_a_byte_order_mark(tmp_path, monkeypatch):
    path, text = tmp_path / "prompts.txt", "one\r\n\r\n第二\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    values, _ = parsed("--mode=generate", f"--prompt_file={path}")
    assert main.read_prompts(values) == ["one", "第二"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    values, _ = parsed("--mode=generate", "--prompt_file=-")
    assert main.read_prompts(values) == ["one", "第二"]


def test_prompts_come_through_a_pipe_and_what_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.write(write, b"one\ntwo\n")
    os.close(write)
    values, _ = parsed("--mode=generate", f"--prompt_file=/dev/fd/{read}")
    assert main.read_prompts(values) == ["one", "two"]
    os.close(read)
    values, _ = parsed("--mode=generate", f"--prompt_file={tmp_path}")
    with pytest.raises(
        UserError, match=r"--prompt_file=.* cannot be read \(Is a directory\); give a text file"
    ):
        main.read_prompts(values)
    monkeypatch.setattr(
        pathlib.Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "No"))
    )
    with pytest.raises(UserError, match=r"--prompt_file=.* cannot be read \(No\); give a text file"):
        main.read_prompts(values)


def test_prompts_come_from_flags_and_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("第三\n\nfourth = 'x'\n", encoding="utf-8")
    values, _ = parsed(
        "--mode=generate", "--prompt=first", "--prompt=second, with a comma", f"--prompt_file={path}"
    )
    assert main.read_prompts(values) == ["first", "second, with a comma", "第三", "fourth = 'x'"]


def test_a_prompt_is_utf_8_whatever_the_locale():
    typed = "春江".encode().decode("ascii", "surrogateescape")
    values, _ = parsed("--mode=generate", f"--prompt={typed}")
    assert main.read_prompts(values) == ["春江"]


def test_prompts_come_from_a_pipe_that_has_a_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("one\ntwo",))
    writer.start()
    values, _ = parsed("--mode=generate", f"--prompt_file={tmp_path / 'pipe'}")
    assert main.read_prompts(values) == ["one", "two"]
    writer.join()


@pytest.mark.parametrize("what, sentence", [("folder", "cannot be read .Is a directory.; give a text file"),
                                            ("nothing", "does not exist; give a text file"),
                                            ("empty", "has no line with text; write one prompt a line")])  # fmt: skip
def test_a_file_of_prompts_that_will_not_do_is_named(what, sentence, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_text("\n\r\n")
    values, _ = parsed("--mode=generate", f"--prompt_file={tmp_path / what}")
    with pytest.raises(UserError, match=f"--prompt_file={tmp_path / what} {sentence}"):
        main.read_prompts(values)


@pytest.mark.parametrize("words, code", [("--mode=generate --prompt_file=-", 2), ("--help", 0)])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_as_one_to_nowhere(closed, words, code):
    line = f"{sys.executable} -m llmjax {words} {closed}"
    done = subprocess.run(
        line, shell=True, capture_output=True, stdin=subprocess.DEVNULL, cwd=tiny_run.ROOT, check=False
    )
    assert done.returncode == code and b"Traceback" not in done.stderr


def test_a_workdir_alone_brings_its_config(tmp_path):
    workdir = a_run(tmp_path, **{"model.num_layers": 5})
    _, config = main.parse(["llmjax", f"--workdir={workdir}", "--config.train.num_updates=9"])
    assert config["model"]["num_layers"] == 5 and config["train"]["num_updates"] == 9
    assert main_sources(config) == ("stdlib",)


def test_help_begins_with_the_docstring(capsys):
    assert main.main(["llmjax", "--help"]) == 0
    assert capsys.readouterr().out.startswith(main.__doc__.strip())


def test_ctrl_c_ends_without_a_traceback(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    tiny_run.replace_in_modes(monkeypatch, "make_corpus", interrupt)
    assert main.main(command(folder, f"--workdir={tmp_path}")) == 130
    assert capsys.readouterr().err == "\nllmjax: interrupted\n"
