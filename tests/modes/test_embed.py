"""Vectors as a user gets them: of texts, of all tokens as a file, and neighbours; of runs and of other models."""

import io
import json
import sys

import jax
import numpy as np
import pytest
import tiny_run

import llmjax
from llmjax import main
from llmjax.modes.embed import TextEmbedder, describe_neighbours, describe_table, describe_vector
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture
from tools import convert

SETTINGS = {
    "tokenizer__kind": "bpe", "tokenizer__vocab_size": 400, "train__num_updates": 1, "evaluate__every": 0,
    "checkpoint__every": 0, "compute__accumulation_steps": 1,
}  # fmt: skip
TEXTS = ["river stone", "a light cloud", "春江潮水连海平", "code " * 9]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compile_once):  # noqa: F811 - the fixture
    """The workdir of a run of a GPT."""
    folder = tmp_path_factory.mktemp("embed")
    tiny_run.write_corpus(folder / "corpus", text=tiny_run.CHINESE)
    assert main.main(tiny_run.command(folder, f"--workdir={folder / 'run'}", **SETTINGS)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def vectors(trained):
    return llmjax.load(trained).embed(TEXTS)


def test_a_text_of_several_lines_takes_one_line():
    vector = np.ones(2, np.float32)
    assert describe_vector("a\nb", vector, False) == "a\\nb 1 1"
    assert describe_neighbours("a\tb", [("c\r\nd", 0.5)], False) == "a\\tb\t0.5000\tc\\r\\nd"


def test_vectors_in_python_are_those_of_each_text_alone(trained, vectors):
    run_ = llmjax.load(trained)
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(run_.embed(text), vector, rtol=1e-5, atol=1e-6)
    last = run_.embed(TEXTS, pool="last", normalize=True)
    np.testing.assert_allclose(np.linalg.norm(last, axis=1), 1, rtol=1e-5)
    assert np.abs(last[0] - vectors[0] / np.linalg.norm(vectors[0])).max() > 1e-2
    assert run_.embed([]).shape == (0, 16)
    near = run_.neighbours(TEXTS[0], TEXTS)
    assert near[0] == (TEXTS[0], pytest.approx(1)) and [cosine for _, cosine in near] == sorted(
        (cosine for _, cosine in near), reverse=True
    )
    with pytest.raises(llmjax.errors.UserError, match="embed.pool='max' is not known"):
        run_.embed("a", pool="max")


def test_texts_from_flags_a_file_and_standard_input_get_these_vectors(
    trained, vectors, tmp_path, capsys, monkeypatch
):
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    words = ["llmjax", f"--workdir={trained}", "--mode=embed"]
    of_file = run(capsys, [*words, f"--prompt_file={tmp_path / 'texts.txt'}"]).splitlines()
    assert run(capsys, [*words, *(f"--prompt={text}" for text in TEXTS)]).splitlines() == of_file
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    of_lines = [json.loads(line) for line in run(capsys, [*words, "--jsonl"]).splitlines()]
    for text, vector, line, values in zip(TEXTS, vectors, of_file, of_lines, strict=True):
        shown, *numbers = line.rsplit(" ", 16)
        assert shown == text == values["text"]
        np.testing.assert_allclose(np.array(numbers, np.float32), vector, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values["vector"], vector, rtol=1e-5, atol=1e-6)


def test_the_table_of_the_tokens_is_a_file_as_word2vec_writes_it(trained, tmp_path, capsys):
    file = tmp_path / "table.txt"
    words = ["llmjax", f"--workdir={trained}", "--mode=embed", f"--table={file}"]
    assert "holds the vectors of 400 tokens" in run(capsys, words)
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    loaded = llmjax.load(trained)._loaded
    table = np.asarray(loaded.params["embedding"]["embedding_VD"])
    assert head == "400 16" and len(lines) == 400
    names = [line.split(" ")[0] for line in lines]
    assert len(set(names)) == 400
    np.testing.assert_array_equal(np.array([line.split(" ")[1:] for line in lines], np.float32), table)
    # A line of a file may end in other characters for Python than for other programs.
    assert describe_table(["a"], np.ones((1, 2))) == "1 2\na 1 1\n"
    near = llmjax.load(trained).neighbours("river", neighbours=3)
    own = names.index("▁river")
    cosines = table @ table[own] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[own])
    silent = [i for i in range(400) if not loaded.tokenizer.id_to_bytes(i)]
    cosines[[own, *silent]] = -2
    assert [name for name, _ in near] == [names[i] for i in np.argsort(-cosines)[:3]]


def test_neighbours_are_tokens_or_prompts_in_chinese_as_well(trained, capsys):
    words = [
        "llmjax",
        f"--workdir={trained}",
        "--mode=embed",
        "--config.embed.neighbours=3",
        "--neighbours=春江",
    ]
    lines = [line.split("\t") for line in run(capsys, words).splitlines()]
    assert len(lines) == 3 and all(word == "春江" and near not in "春江" for word, _, near in lines)
    words += ["--neighbours=river", "--jsonl", *(f"--prompt={text}" for text in TEXTS)]
    found = [json.loads(line) for line in run(capsys, words).splitlines()]
    assert [values["text"] for values in found] == ["春江", "river"]
    assert all(near["text"] in TEXTS for near in found[0]["neighbours"]) and len(found[0]["neighbours"]) == 3
    err = refuse(capsys, ["llmjax", f"--workdir={trained}", "--mode=embed", "--neighbours= "])
    assert "the word ' ' has no token in this vocabulary" in err


def test_a_text_that_is_too_long_is_cut_and_that_is_said_once(trained, capsys):
    embedder = TextEmbedder(llmjax.load(trained)._loaded)
    long = "river " * 90
    (cut, _) = embedder.embed([long, "river"])
    embedder.embed([long])
    err = capsys.readouterr().err
    assert err.count("are cut") + err.count("is cut at the end to the 32 tokens that a row holds") == 1
    tokenizer = embedder._loaded.tokenizer
    short = tokenizer.decode(tokenizer.encode(long)[:31])
    np.testing.assert_allclose(embedder.embed([short])[0], cut, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mode=embed", "--prompt=a", "--config.embed.pool=first"], "embed.pool='first' reads the first token"),
        (["--mode=embed", "--table=."], "--table=. is no name of a file; give one"),
        (["--mode=generate", "--table=x"], "--table is not heeded by --mode=generate"),
        (["--mode=classify", "--neighbours=x"], "--neighbours is not heeded by --mode=classify"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(words, message, trained, capsys):
    assert message in refuse(capsys, ["llmjax", f"--workdir={trained}", *words])


@pytest.mark.slow
def test_an_encoder_decoder_gives_the_vectors_of_its_encoder(tmp_path, capsys):
    tiny_run.write_pairs(tmp_path / "corpus")
    settings = {
        **SETTINGS,
        "tokenizer__kind": "byte",
        "model__family": "encoder_decoder",
        "task__name": "translation",
    }
    run(capsys, tiny_run.command(tmp_path, f"--workdir={tmp_path / 'run'}", **settings, data__source_len=24))
    loaded = llmjax.load(tmp_path / "run")._loaded
    # A row for each of the devices of the tests.
    ids = np.array([[*loaded.tokenizer.encode("river"), loaded.tokenizer.eos_id]] * 8, np.int32)
    own, places = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None] * np.ones_like(ids)
    states = np.asarray(jax.jit(loaded.program.model.encode_source)(loaded.params, ids, own, places))[0]
    found = TextEmbedder(loaded).embed(["stone", "river"])
    np.testing.assert_allclose(found[1], states.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_folder_of_transformers_gives_vectors_without_a_run(trained, vectors, tmp_path, capsys):
    assert convert.main(["--from", "llmjax", "--to", "hf", str(trained), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    words = tiny_run.command(tmp_path, f"--workdir={tmp_path / 'none'}", "--mode=embed", "--jsonl",
                             checkpoint__init_from=tmp_path / "hf")  # fmt: skip
    (line,) = run(capsys, [*words, f"--prompt={TEXTS[0]}"]).splitlines()
    np.testing.assert_allclose(json.loads(line)["vector"], vectors[0], rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "none").exists()
