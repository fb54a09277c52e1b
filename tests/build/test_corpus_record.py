"""What becomes of a run when the documents behind it changed, moved or when its tokenizer is damaged."""

import contextlib
import io
import shutil
import types

import pytest
import tiny_run
from tiny_run import CHINESE, command

from llmjax import main
from llmjax.build.corpus_record import mend_tokenizer
from llmjax.config.init_from import own_tokenizer
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.errors import UserError

SETTINGS = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 400, "train__num_updates": 2}


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """These runs are of one and the same program."""
    with tiny_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a run whose tokenizer was trained on its documents."""
    folder = tmp_path_factory.mktemp("documents")
    tiny_run.write_corpus(folder / "corpus", text=f"\n{CHINESE}\n")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(command(folder, f"--workdir={folder / 'run'}", **SETTINGS)) == 0
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of it."""
    return shutil.copytree(original, tmp_path / "copy")


def words_of(folder, *words, **settings):
    """A command for the run in `folder`, on the documents in `folder`."""
    return command(folder, f"--workdir={folder / 'run'}", *words, **SETTINGS | settings)


def run(capsys, words):
    """What a command that must end well prints, and says of damage."""
    code = main.main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def refuse(capsys, words):
    """The sentence with which a start is refused."""
    capsys.readouterr()
    assert main.main(words) == 2
    return capsys.readouterr().err


def held_out_loss(out):
    return out.split("held-out loss")[-1].split()[0]


def test_every_mode_uses_the_tokenizer_of_the_run_and_names_documents_that_are_not_its_own(folder, capsys):
    run_dir = folder / "run"
    model = (run_dir / "tokenizer" / "tokenizer.model").read_bytes()
    generate = words_of(folder, "--mode=generate", "--config.generate.temperature=0", "--prompt=river stone")
    assert "not those of the run" not in run(capsys, words_of(folder, "--mode=evaluate"))[0]
    text = run(capsys, generate)
    (folder / "corpus" / "000.txt").write_text("quite other words, zigzag and quartz, " * 50)
    (folder / "corpus" / "new\n\x1b.txt").write_text("river")
    (folder / "corpus" / "001.txt").unlink()
    shutil.rmtree(folder / "cache")
    for mode in ("evaluate", "plan"):
        out, err = run(capsys, words_of(folder, f"--mode={mode}"))
        assert (
            f"the documents behind data.sources are not those of the run in {run_dir} (40 documents of" in out
        )
        assert r"000.txt changed, 001.txt gone, new\n\x1b.txt new)" in out.split("\n")[0]
        assert err == "" and not list((folder / "cache").glob("tokenizer-*")), mode
    assert run(capsys, generate) == text
    sentence = refuse(capsys, words_of(folder, "--config.train.num_updates=4"))
    assert "000.txt changed, 001.txt gone" in sentence and "another --workdir" in sentence
    assert (run_dir / "tokenizer" / "tokenizer.model").read_bytes() == model


def test_a_corpus_that_merely_moved_is_the_same(folder, tmp_path, capsys):
    shutil.copytree(folder / "corpus", tmp_path / "moved", copy_function=shutil.copyfile)
    here = held_out_loss(run(capsys, words_of(folder, "--mode=evaluate"))[0])
    shutil.rmtree(folder / "corpus")
    moved = {"data__sources": tmp_path / "moved"}
    out, err = run(capsys, words_of(folder, "--mode=evaluate", **moved))
    assert held_out_loss(out) == here and "not those of the run" not in out and err == ""
    assert "update 3/3" in run(capsys, words_of(folder, **moved | {"train__num_updates": 3}))[0]


def test_a_damaged_tokenizer_of_a_run_is_made_again_of_its_documents_and_no_others(folder, capsys):
    path = folder / "run" / "tokenizer" / "tokenizer.model"
    good = path.read_bytes()
    harm(path, "cut")
    assert "let --mode=evaluate make it again" in refuse(capsys, words_of(folder, "--mode=generate"))
    out, err = run(capsys, words_of(folder, "--mode=evaluate"))
    assert "held-out loss" in out and "it is made again if data.sources hold" in err
    assert path.read_bytes() == good
    harm(path, "cut")
    (folder / "corpus" / "000.txt").write_text("quite other words, zigzag and quartz, " * 50)
    sentence = refuse(capsys, words_of(folder, "--mode=evaluate"))
    assert "cannot be made again, for the documents behind data.sources" in sentence
    assert path.read_bytes() == good[: len(good) // 2]


@pytest.mark.parametrize("damage", ["cut", "emptied", "missing", "a folder", "a byte"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_no_damage_of_a_tokenizer_goes_unseen(damage, name, original, tmp_path):
    tokenizer = load_tokenizer(original / "run" / "tokenizer")
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)  # of a run that has begun
    corpus = types.SimpleNamespace(tokenizer=tokenizer)
    harm(tmp_path / "tokenizer" / name, damage)
    if (damage, name) != ("missing", "tokenizer.json"):  # like a model made by others, which has none
        with pytest.raises(UserError, match="let --mode=evaluate make it again") as error:
            own_tokenizer(tmp_path)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="cannot be made again, for they differ"):
            mend_tokenizer(tmp_path, corpus, "they differ")
    mend_tokenizer(tmp_path, corpus, "")
    assert own_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def harm(path, how):
    """Damages a file as disks, copies and people do."""
    data = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "missing":
        middle = len(data) // 2
        a_byte = data[:middle] + bytes((data[middle] ^ 1,)) + data[middle + 1 :]
        path.write_bytes({"cut": data[:middle], "emptied": b"", "a byte": a_byte}[how])
