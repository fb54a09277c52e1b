"""Runs as GGUF files and back: nothing is lost, new runs begin with them, and mistakes write nothing."""

import json

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import command

from llmjax import main
from llmjax.build.conversion import load_foreign, load_run
from llmjax.data.tokenizer.loading import load_tokenizer
from tests.build.test_conversion import HARD, convert_to, refused
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

SETTINGS = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 320, "model__tie_embeddings": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a tiny run with a SentencePiece tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_run.write_corpus(folder / "corpus")
    assert main.main(command(folder, f"--workdir={folder / 'run'}", **SETTINGS)) == 0
    (folder / "run" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained):
    """The GGUF file of this run."""
    folder = trained.parent / "gguf"
    assert convert_to("llmjax", "gguf", trained, folder) == 0
    return folder / "model.gguf"


def certificate(folder):
    return json.loads((folder / "certificate.json").read_text(encoding="utf-8"))


def test_a_run_that_is_written_and_read_again_is_the_same_bit_for_bit(trained, exported, tmp_path):
    ours, read = load_run(trained), load_foreign("gguf", exported)
    jax.tree.map(np.testing.assert_array_equal, read.params, ours.params)
    assert [read.tokenizer.encode(text) for text in HARD] == [ours.tokenizer.encode(text) for text in HARD]
    assert read.chat_template == ours.chat_template == "{{ messages }}"
    free = {"model.dropout", "model.init_std"}
    assert {key: value for key, value in read.settings.items() if key not in free} == {
        key: value for key, value in ours.settings.items() if key not in free
    }
    assert convert_to("gguf", "llmjax", exported, tmp_path / "again") == 0
    again = load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    assert again.chat_template == "{{ messages }}"
    assert again.tokenizer.fingerprint == read.tokenizer.fingerprint


def test_through_a_folder_of_transformers_nothing_is_lost_either(trained, exported, tmp_path):
    assert convert_to("gguf", "hf", exported, tmp_path / "hf") == 0
    found, ours = load_foreign("hf", tmp_path / "hf"), load_run(trained)
    jax.tree.map(np.testing.assert_array_equal, found.params, ours.params)
    assert found.chat_template == "{{ messages }}"
    (tmp_path / "hf" / "tokenizer.model").unlink()
    theirs = load_tokenizer(tmp_path / "hf")
    assert [theirs.encode(text) for text in HARD] == [ours.tokenizer.encode(text) for text in HARD]
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1, "all files may be read by the same people"


def test_the_certificate_accounts_for_every_tensor(exported, tmp_path):
    facts = certificate(exported.parent)
    source = load_foreign("gguf", exported).facts["tensors"]
    tensors = facts["to"]["tensors"]
    assert facts["to"]["architecture"] == "qwen3" and facts["files"].keys() == {"model.gguf"}
    assert tensors.keys() == source.keys()
    for name, tensor in tensors.items():
        assert tensor["sha256"] == source[name]["sha256"] and tensor["made of"] == source[name]["became"]
    assert convert_to("gguf", "gguf", exported, tmp_path / "q8", "--dtype", "q8_0") == 0
    kinds = {tensor["dtype"] for tensor in certificate(tmp_path / "q8")["to"]["tensors"].values()}
    # Some rows of the tiny model are shorter than a block of Q8_0.
    assert kinds == {"Q8_0", "F16", "F32"}


@pytest.mark.slow
def test_a_new_run_begins_with_the_file_and_goes_on_without_it(trained, exported, tmp_path, capsys):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(exported.read_bytes())
    settings = SETTINGS | {"checkpoint__init_from": copy, "train__num_updates": 1}
    words = command(trained.parent, f"--workdir={tmp_path / 'new'}", **settings)
    last = tiny_run.read_lines(trained)[-1]
    out = run(capsys, [*words, "--mode=evaluate"])
    assert f"{last['loss']:.4f}" in out and f"update 0 of {copy}" in out
    greedy = [
        "--mode=generate",
        "--prompt=a",
        "--config.generate.temperature=0",
        "--config.generate.max_tokens=8",
    ]
    assert run(capsys, [*words, *greedy]) == run(capsys, ["llmjax", f"--workdir={trained}", *greedy])
    assert not (tmp_path / "new").exists()
    assert "--checkpoint=5 is of a run, and" in refuse(capsys, [*words, *greedy, "--checkpoint=5"])
    assert f"beginning with the parameters of update 0 of {copy}" in run(capsys, words)
    copy.unlink()
    run(capsys, ["llmjax", f"--workdir={tmp_path / 'new'}", "--config.train.num_updates=2"])
    other = [*words, f"--workdir={tmp_path / 'other'}"]
    assert "copy.gguf' does not exist; fetch the file" in refuse(capsys, other)


@pytest.mark.parametrize("size", [0, 3, 30, 5000, -1])
def test_a_file_that_was_cut_short_is_one_sentence_and_nothing_is_written(exported, tmp_path, capsys, size):
    (tmp_path / "cut.gguf").write_bytes(exported.read_bytes()[:size])
    said = refused(capsys, "gguf", "llmjax", tmp_path / "cut.gguf", tmp_path / "x")
    assert "cut.gguf is no whole GGUF file" in said
    assert {path.name for path in tmp_path.iterdir()} == {"cut.gguf"}


def test_what_transformers_misreads_is_not_compared_with_it(trained, tmp_path, capsys):
    said = refused(capsys, "llmjax", "gguf", trained, tmp_path / "x", "--verify")
    assert "takes each Qwen 3 in a GGUF file for one of head_dim=128, and this one has" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_verify_compares_the_written_file_with_transformers(stories_gguf, tmp_path, dtype):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert convert_to("gguf", "gguf", stories_gguf, tmp_path / "a", "--verify", "--dtype", dtype) == 0
    facts = certificate(tmp_path / "a")
    assert facts["verified against transformers"]["largest difference / largest logit"] < 1e-4
    assert (facts["changed by rounding"]["largest difference"] == 0) == (dtype == "float32")
    assert convert_to("gguf", "hf", tmp_path / "a" / "model.gguf", tmp_path / "b", "--verify") == 0


@pytest.fixture(scope="module")
def stories_gguf(tmp_path_factory, request):
    """stories260K as a GGUF file."""
    data = request.getfixturevalue("shared_data") / "weights" / "stories260K"
    folder = tmp_path_factory.mktemp("stories") / "gguf"
    assert convert_to("llama2c", "gguf", data / "stories260K.bin", folder) == 0
    return folder / "model.gguf"
