"""`--mode=translate`: a line for a line, from every family that can, with beams, references and mistakes."""

import io
import json

import pytest
import tiny_run
from tiny_run import command

import llmjax
from llmjax import main
from llmjax.modes.translate import describe_scores
from llmjax.workdir.samples import read_samples
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

# Enough for a few words to be learned, so that translations are not noise alone.
LEARNED = {
    "data__seq_len": 64, "train__num_updates": 100, "compute__accumulation_steps": 1, "optimizer__name": "muon",
    "optimizer__learning_rate": 0.01,
    "evaluate__every": 0, "checkpoint__every": 0, "model__model_dim": 32, "task__name": "translation",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tiny_run.write_pairs(folder / "corpus", 400)
    return folder


def settings_of(family, **changes):
    return {"model__family": family, **LEARNED, **changes}


@pytest.fixture(scope="module", params=["encoder_decoder", pytest.param("gpt", marks=pytest.mark.slow)])
def trained(folder, request):
    workdir = folder / request.param
    assert main.main(command(folder, f"--workdir={workdir}", **settings_of(request.param))) == 0
    return workdir


def translate(capsys, workdir, *words):
    return run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=translate", *words])


def test_a_short_text_is_learned_and_its_sample_is_a_translation(trained, capsys):
    said = translate(capsys, trained, "--prompt=river", "--config.generate.temperature=0.0")
    assert said == "河\n"
    samples, _ = read_samples(trained)
    assert set(samples[-1].prompt.split()) <= set(tiny_run.WORDS)
    summary = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    assert "--mode=translate" in summary["commands"]["translate"] and "generate" not in summary["commands"]


def test_every_line_has_its_answer_and_references_give_bleu(trained, tmp_path, capsys):
    pytest.importorskip("sacrebleu")
    texts, right = tmp_path / "texts", tmp_path / "right"
    texts.write_text("river\n\nstone\n")
    right.write_text("河\n\n石\n")
    words = f"--prompt_file={texts}", f"--references={right}", "--config.generate.num_beams=3"
    assert main.main(["llmjax", f"--workdir={trained}", "--mode=translate", *words]) == 0
    out, err = capsys.readouterr()
    assert out == "河\n\n石\n"
    assert "BLEU = " in err and "tok:zh" in err and "chrF2 = 100.00" in err


def test_lines_of_a_pipe_are_translated_one_by_one(trained, monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"river\nstone\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert translate(capsys, trained, "--interactive", "--config.generate.temperature=0.0") == "河\n石\n"


def test_python_translates(trained):
    loaded = llmjax.load(trained)
    assert loaded.translate("river", num_beams=2) == "河"
    with pytest.raises(llmjax.errors.UserError, match="use --mode=translate"):
        loaded.generate("river")


@pytest.mark.parametrize("words, message", [
    ([], "--mode=translate has nothing to translate; give --prompt=TEXT, --prompt_file=FILE"),
    (["--prompt=river", "--config.generate.num_samples=3"], "generate.num_samples=3 is without effect for --mode=tr"),
    (["--interactive", "--references=ONE"], "--references is for texts of a file, not for --interactive"),
    (["--prompt=river", "--references=/nowhere"], "--references=/nowhere cannot be read"),
    (["--prompt=river", "--prompt=stone", "--references=ONE"], "has 1 lines for 2 texts; give one line for each"),
])  # fmt: skip
def test_mistakes_are_one_sentence(trained, words, message, tmp_path, capsys):
    (tmp_path / "one").write_text("河\n")
    words = [word.replace("ONE", str(tmp_path / "one")) for word in words]
    assert message in refuse(capsys, ["llmjax", f"--workdir={trained}", "--mode=translate", *words])


def test_a_run_of_another_task_does_not_translate(folder, tmp_path, capsys):
    settings = {"task__name": "language_model", "train__num_updates": 1, "evaluate__every": 0}
    assert main.main(command(folder, f"--workdir={tmp_path}", **settings)) == 0
    capsys.readouterr()
    said = refuse(capsys, ["llmjax", f"--workdir={tmp_path}", "--mode=translate", "--prompt=a"])
    assert "task.name='language_model' does not translate; use --mode=generate" in said


def test_texts_of_the_same_source_are_held_out_together(folder):
    from llmjax.data.examples.translations import Translations
    from llmjax.data.store.encode import encode_records
    from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer

    records = [
        {"source": "hi", "text": "嗨"},
        {"source": "hi", "text": "你好"},
        {"source": "ho", "text": "嗨"},
    ]
    hashes = encode_records(ByteTokenizer(), Translations("source", "text", True), records).fixed["hashes"]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "references", [["GitHub", "我喜欢这本书。"], ["", "我喜欢这本书。"], ["我喜欢这本书。", "GitHub"]]
)
def test_chinese_is_scored_as_chinese_wherever_it_stands(references):
    pytest.importorskip("sacrebleu")
    assert "tok:zh" in describe_scores(references, references)[0]


def test_pairs_without_a_source_or_a_text_are_counted_as_empty(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    pairs = [("a", "b")] * 400 + [("", "c"), ("  ", "d"), ("e", "")]
    rows = [json.dumps({"source": source, "text": text}) for source, text in pairs]
    (tmp_path / "corpus" / "pairs.jsonl").write_text("\n".join(rows))
    settings = settings_of("encoder_decoder", train__tokens_per_update=512, data__held_out_fraction=0.0)
    said = run(capsys, [*command(tmp_path, f"--workdir={tmp_path}/plan", **settings), "--mode=plan"])
    assert "400 documents" in said and "3 empty" in said
