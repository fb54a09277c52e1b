"""A classification as a user runs it: labels found and kept, lines labelled, mistakes in one sentence."""

import gzip
import io
import json
import sys

import jax
import numpy as np
import pytest
import tiny_run

import llmjax
from llmjax import main
from llmjax.modes.classify import TextClassifier
from llmjax.scores.confusion import FILE as CLASSES_FILE
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

SETTINGS = {
    "task__name": "classification", "model__family": "bert", "data__seq_len": 64, "train__num_updates": 60,
    "evaluate__every": 0, "checkpoint__every": 0, "optimizer__learning_rate": 0.03, "compute__accumulation_steps": 1,
}  # fmt: skip
LABELS = ("loud", "quiet")


def texts_of(number=160, seed=0):
    """Pairs of a label and a text, which is `loud` if one of its words has a mark of exclamation."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(number):
        words = rng.choice(tiny_run.WORDS, rng.integers(1, 7)).tolist()
        if loud := bool(rng.random() < 0.5):
            words[rng.integers(len(words))] += "!"
        pairs.append(("loud" if loud else "quiet", " ".join(words)))
    return pairs


def write_table(folder, pairs, name="texts.tsv"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["label\ttext", *(f"{label}\t{text}" for label, text in pairs)]))


def command(folder, *words, **settings):
    return tiny_run.command(folder, *words, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    write_table(folder / "corpus", texts_of())
    return folder


@pytest.fixture(scope="module")
def trained(folder, compile_once):  # noqa: F811 - the fixture
    """The workdir of a run that has learned what loud is."""
    assert main.main(command(folder, f"--workdir={folder / 'run'}")) == 0
    return folder / "run"


def test_a_run_learns_and_its_report_and_files_say_how_well(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["classification"]["labels"] == list(LABELS)
    classes = json.loads((trained / CLASSES_FILE).read_text())
    last = [line for line in tiny_run.read_lines(trained) if line["kind"] == "evaluate"][-1]
    matrix = np.array(classes["confusion"])
    assert classes["update"] == 60 and classes["labels"] == list(LABELS)
    assert last["accuracy"] == np.trace(matrix) / matrix.sum() > 0.9
    page = (trained / "report.html").read_text()
    for words in ("<h2>Classes</h2>", "of \\ taken for", "precision", "Calibration"):
        assert words in page
    summary = json.loads((trained / "summary.json").read_text())
    assert "--mode=classify" in summary["commands"]["classify"] and "generate" not in summary["commands"]
    assert summary["plan"]["labels"].startswith("2: loud ")


def test_texts_from_flags_a_file_and_standard_input_get_the_same_labels(
    trained, tmp_path, capsys, monkeypatch
):
    pairs = texts_of(40, seed=1)
    texts = [text for _, text in pairs]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    words = ["llmjax", f"--workdir={trained}", "--mode=classify"]
    of_file = run(capsys, [*words, f"--prompt_file={tmp_path / 'texts.txt'}"]).splitlines()
    assert run(capsys, [*words, *(f"--prompt={text}" for text in texts)]).splitlines() == of_file
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    of_lines = [json.loads(line) for line in run(capsys, [*words, "--jsonl"]).splitlines()]
    right = 0
    for (label, text), line, values in zip(pairs, of_file, of_lines, strict=True):
        found, share, shown = line.split("\t")
        assert shown == text == values["text"] and found == values["label"]
        assert float(share) == pytest.approx(values["probabilities"][found], abs=1e-4)
        assert sum(values["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert next(iter(values["probabilities"])) == found
        right += found == label
    assert right >= 36


def test_texts_in_one_row_are_labelled_as_each_by_itself(trained):
    run_ = llmjax.load(trained)
    texts = [text for _, text in texts_of(30, seed=2)]
    together = run_.classify(texts)
    for text, answer in zip(texts, together, strict=True):
        alone = run_.classify(text)
        assert alone.label == answer.label
        assert alone.probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    assert run_.evaluate()["accuracy"] > 0.9


def test_a_text_that_is_too_long_is_cut_and_that_is_said_once(trained, capsys):
    classifier = TextClassifier(llmjax.load(trained)._loaded)
    (answer, short) = classifier.classify(["stone! " + "river " * 40, "river"])
    classifier.classify(["river " * 40])
    err = capsys.readouterr().err
    assert err.count("note: 1 text of up to 248 tokens is cut at the end to the data.seq_len=64 tokens") == 1
    assert (answer.label, short.label) == ("loud", "quiet") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mode=classify", "--prompt= "], "text 1, ' ', is empty; give some text"),
        (["--mode=generate"], "'classification' gives labels to texts and continues none; use --mode=classify"),
        (["--config.classification.labels=quiet,loud"], "holds a run of another config: classification.labels"),
        (["--mode=train", "--jsonl"], "--jsonl is not heeded by --mode=train"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(words, message, trained, capsys):
    assert message in refuse(capsys, ["llmjax", f"--workdir={trained}", *words])


def test_labels_that_the_run_does_not_know_are_named_with_file_and_line(trained, tmp_path, capsys):
    write_table(tmp_path / "corpus", [*texts_of(5), ("cloud", "a cloud")], name="more.tsv")
    words = ["llmjax", f"--workdir={trained}", "--mode=evaluate"]
    err = refuse(capsys, [*words, f"--config.data.sources={tmp_path / 'corpus'}"])
    assert "more.tsv#7 has the label 'cloud', which is none of classification.labels=('loud', 'quiet')" in err


def test_a_run_keeps_its_labels_when_it_goes_on_or_is_given_other_documents(trained, tmp_path, capsys):
    write_table(tmp_path / "corpus", [pair for pair in texts_of(160, seed=3) if pair[0] == "loud"])
    out = run(
        capsys,
        ["llmjax", f"--workdir={trained}", "--mode=evaluate", f"--config.data.sources={tmp_path / 'corpus'}"],
    )
    assert "the documents behind data.sources are not those of the run" in out and "accuracy" in out


MISTAKES = {
    "one label": ([("a", "x"), ("a", "y")], {}, "data.sources have only the label 'a'"),
    "empty label": ([("a", "x"), ("", "y")], {}, "texts.tsv#3 has an empty label"),
    "no field": ([("a", "x")], {"classification__label_field": "kind"}, "'kind' is not a column of"),
    "too many": ([(str(i), "x") for i in range(1002)], {}, "more than 1,000 different labels"),
    "unknown": ([("a", "x"), ("b", "y")], {"classification__labels": "a,c"}, "texts.tsv#3 has the label 'b'"),
    "unread": (
        [("a", "x")],
        {"task__name": "copy", "classification__labels": "a,b"},
        "is without effect for",
    ),
    "probes": (
        [("a", "x")],
        {"model__family": "gpt", "evaluate__probes": "position"},
        "predict the next token, which task.name=",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_labels_is_one_sentence_before_anything_is_trained(name, tmp_path, capsys):
    pairs, settings, message = MISTAKES[name]
    write_table(tmp_path / "corpus", pairs)
    assert message in refuse(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}", **settings))
    assert not (tmp_path / "run" / "config.json").exists()


def test_plain_text_without_labels_is_one_sentence(tmp_path, capsys):
    tiny_run.write_corpus(tmp_path / "corpus", 3)
    err = refuse(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}"))
    assert "is plain text, which has no field 'label'" in err and "label_from to file or folder" in err


@pytest.mark.parametrize("place", ["file", "folder"])
def test_labels_may_be_the_names_of_files_or_of_folders(place, tmp_path, capsys):
    pairs = texts_of(60)
    (tmp_path / "corpus").mkdir()
    for label in LABELS:
        lines = [text for own, text in pairs if own == label]
        if place == "file":
            (tmp_path / "corpus" / f"{label}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        else:
            (tmp_path / "corpus" / label).mkdir()
            for i, text in enumerate(lines):
                (tmp_path / "corpus" / label / f"{i}.txt").write_text(text)
    settings = {"classification__label_from": place} | ({"data__split_on": r"\n"} if place == "file" else {})
    out = run(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}", "--mode=plan", **settings))
    counts = {label: sum(own == label for own, _ in pairs) for label in LABELS}
    assert f"2: loud {counts['loud']}, quiet {counts['quiet']}\n" in out


def params_of(workdir):
    run_ = llmjax.load(workdir)
    return run_._loaded.params


@pytest.mark.slow
def test_a_pretrained_model_starts_a_classification_and_the_head_is_new(folder, tmp_path, capsys):
    source, workdir = tmp_path / "source", tmp_path / "run"
    run(
        capsys,
        command(folder, f"--workdir={source}", task__name="masked_language_model", train__num_updates=6),
    )
    settings = {"checkpoint__init_from": source, "train__num_updates": 1, "optimizer__learning_rate": 1e-12}
    out = run(capsys, command(folder, f"--workdir={workdir}", **settings))
    assert (
        f"note: checkpoint.init_from='{source}' has all parameters but classifier, which task.name='classification' "
        "adds and which begins anew" in out
    )
    before, after = params_of(source), params_of(workdir)
    assert set(after) - set(before) == {"classifier"}
    for name, tree in before.items():
        for a, b in zip(flat(tree), flat(after[name]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)
    # And back again: a model without the head.
    settings = {
        "checkpoint__init_from": workdir,
        "task__name": "masked_language_model",
        "train__num_updates": 1,
    }
    run(capsys, command(folder, f"--workdir={tmp_path / 'back'}", **settings))
    assert set(params_of(tmp_path / "back")) == set(before)
    err = refuse(
        capsys,
        command(folder, f"--workdir={tmp_path / 'e'}", "--mode=evaluate", checkpoint__init_from=source),
    )
    assert "begins anew; train first, and then evaluate the run" in err


@pytest.mark.slow
def test_the_head_is_taken_over_only_with_the_same_labels(folder, trained, tmp_path, capsys):
    settings = {"checkpoint__init_from": trained, "train__num_updates": 1, "optimizer__learning_rate": 1e-12}
    out = run(capsys, command(folder, f"--workdir={tmp_path / 'same'}", **settings))
    assert "begins anew" not in out
    a, b = params_of(trained)["classifier"]["w_CD"], params_of(tmp_path / "same")["classifier"]["w_CD"]
    np.testing.assert_allclose(a, b, atol=1e-9)
    out = run(
        capsys,
        command(folder, f"--workdir={tmp_path / 'e'}", "--mode=evaluate", checkpoint__init_from=trained),
    )
    assert "accuracy" in out
    write_table(
        tmp_path / "corpus", [("yes" if label == "loud" else "no", text) for label, text in texts_of()]
    )
    settings["data__cache_dir"] = folder / "cache"
    out = run(capsys, command(tmp_path, f"--workdir={tmp_path / 'other'}", **settings))
    assert "begins anew" in out
    assert llmjax.load(tmp_path / "other").config["classification"]["labels"] == ["no", "yes"]


def flat(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]
