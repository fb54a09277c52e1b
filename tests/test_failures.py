"""What the system refuses is one sentence with a remedy: a table of damages over everything that a command reads."""

import errno
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tiny_run
from tiny_run import BASE, ROOT, command

from llmjax import main
from llmjax.errors import UserError
from llmjax.failures import FAILED, REFUSED, describe_failure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    tiny_run.write_corpus(folder / "corpus")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch):
    """What is wrong is found before any program is made."""

    def make_program(*args, **kwargs):
        raise UserError("a program was made")

    tiny_run.replace_in_modes(monkeypatch, "make_program", make_program)


# Each leaves something at `path` that cannot be used, and gives the path to name.
def a_loop(path):
    path.symlink_to(path)
    return path


def a_folder(path):
    path.mkdir()
    return path


def a_file(path):
    path.write_text("no model")
    return path


def an_empty_file(path):
    path.write_text("")
    return path


def a_long_name(path):
    return path.with_name("a" * 300)


def below_a_file(path):
    path.write_text("x")
    return path / "below"


def below_a_long_name(path):
    return path.with_name("a" * 300) / "below"


def nested_deeply(path):
    path.write_text("[" * 100_000)
    return path


def bytes_of_chance(path):
    path.write_bytes(bytes(range(256)) * 4)
    return path


ANYWHERE = (a_loop, a_long_name, below_a_file, below_a_long_name)
DAMAGES = {
    "cache": (*ANYWHERE, a_file, an_empty_file),
    "plans": (a_loop, a_file),
    "workdir": (*ANYWHERE, a_file, an_empty_file),
    "config.json": (a_loop, a_folder, a_file, an_empty_file, nested_deeply, bytes_of_chance),
    "sources": (*ANYWHERE, a_folder),
    "tokenizer": (*ANYWHERE, a_folder, a_file, an_empty_file, bytes_of_chance),
    "prompts": (*ANYWHERE, a_folder, bytes_of_chance),
    "config": (*ANYWHERE, a_folder, an_empty_file, nested_deeply, bytes_of_chance),
}


def words_of(what, damage, folder, tmp_path):
    """The command that meets the damage."""
    if what == "plans":
        (tmp_path / "cache").mkdir()
    path = damage(tmp_path / ("cache/plans" if what == "plans" else what))
    settings = {"data__cache_dir": tmp_path / "cache"}
    settings |= {"data__cache_dir": path} if what == "cache" else {}
    settings |= {"data__sources": path} if what == "sources" else {}
    settings |= {"tokenizer__path": path, "tokenizer__kind": "bpe"} if what == "tokenizer" else {}
    words = command(folder, f"--workdir={path if what == 'workdir' else tmp_path}", **settings)
    if what == "config":
        words[1:2] = [f"--config={path}"]
    return words + ([f"--prompt_file={path}", "--mode=generate"] if what == "prompts" else [])


@pytest.mark.parametrize(
    "what, damage",
    [(what, damage) for what in DAMAGES for damage in DAMAGES[what]],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_whatever_stands_in_the_way_is_one_sentence(what, damage, folder, tmp_path, capsys):
    assert main.main(words_of(what, damage, folder, tmp_path)) == REFUSED
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llmjax: "), err
    assert "a program was made" not in err, "the damage was passed over"
    assert "; " in err or ": " in err.removeprefix("llmjax: "), "no remedy"
    assert not list(tmp_path.rglob("*building*"))


FULL = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG]


@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
@pytest.mark.parametrize("nth", range(1, 12, 2))
def test_a_full_disk_is_one_sentence_wherever_it_is_met_and_leaves_nothing(
    number, nth, folder, tmp_path, capsys, monkeypatch
):
    calls, real = [], os.fsync

    def fsync(handle):
        calls.append(handle)
        if len(calls) >= nth:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    words = command(
        folder,
        f"--workdir={tmp_path / 'run'}",
        data__cache_dir=tmp_path / "cache",
        tokenizer__kind="bpe",
        tokenizer__vocab_size=320,
    )
    assert main.main(words) == FAILED
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(tmp_path) in err and "; " in err, err
    assert not list(tmp_path.rglob("*building*"))


ERRORS = {
    "memory": (MemoryError(), FAILED, "not enough memory"),
    "memory of numpy": (MemoryError("Unable to allocate 9. TiB"), FAILED, "9. TiB"),
    "memory of the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), FAILED, "not enough memory"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), FAILED, "nested too deeply"),
    "ascii": (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"), REFUSED, "PYTHONUTF8"),
    "no number": (OSError("40 requested and 8 written"), FAILED, "40 requested and 8 written"),
    "unknown number": (
        OSError(9999, "strange\nthing", "a\udcff"),
        FAILED,
        r"a\xff cannot be used (strange\nthing)",
    ),
    "of a library": (
        ValueError('RESOURCE_EXHAUSTED: writing "x" [OS error 28: No space left]'),
        FAILED,
        "disk is full",
    ),
    "of TensorStore": (
        ValueError(
            "OUT_OF_RANGE: at local file \"/a/b/\": Failed to write 9 bytes: Disk full [os_error_code='28']"
        ),
        FAILED,
        "/a/b/ cannot be written (the disk is full)",
    ),
    "bytes": (OSError(errno.ENOSPC, "No space", b"a\xff"), FAILED, r"a\xff cannot be written"),
}


def test_a_device_without_enough_memory_has_a_sentence():
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as found:
        jnp.zeros(2**45).block_until_ready()
    code, sentence = describe_failure(found.value)
    assert code == FAILED and "140737488355328 bytes" in sentence and "compute.accumulation_steps" in sentence


@pytest.mark.parametrize("name", ERRORS)
def test_every_refusal_of_the_system_has_a_sentence(name):
    error, code, words = ERRORS[name]
    found = describe_failure(error)
    assert found is not None and found[0] == code and words in found[1] and "\n" not in found[1]


@pytest.mark.parametrize("number", errno.errorcode)
def test_every_error_number_has_a_sentence(number):
    code, sentence = describe_failure(OSError(number, os.strerror(number), "the/path"))
    assert code in (REFUSED, FAILED) and "; " in sentence
    assert "the/path" in sentence or number == errno.ENOMEM


def test_a_bug_is_not_hidden():
    assert describe_failure(ValueError("operands could not be broadcast")) is None
    assert describe_failure(KeyError("loss")) is None


def start(*words, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "llmjax.main", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_an_ascii_terminal_gets_escapes_instead_of_an_error():
    process = start(
        BASE,
        "--config.data.sources=诗",
        "--config.seed=é",
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
        PYTHONUTF8="0",
    )
    _, err = process.communicate()
    assert process.returncode == REFUSED and b"--config.seed=\\" in err, err


def test_a_reader_who_leaves_ends_the_program_in_silence():
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-m", "llmjax.main", "--help"],
        env=env,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")
