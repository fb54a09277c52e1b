"""llmjax from Python: train, load, generate, score, evaluate; the same numbers as the command line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

import llmjax
from configs import base
from llmjax.errors import UserError
from llmjax.main import main


def changes(folder):
    return {
        **tiny_run.SETTINGS,
        "data.sources": (str(folder / "corpus"),),
        "data.cache_dir": str(folder / "cache"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    tiny_run.write_corpus(root / "corpus")
    return root


@pytest.fixture(scope="module")
def run(folder):
    return llmjax.train("configs/base.py", changes(folder), workdir=folder / "run")


def test_training_gives_the_losses_of_the_command_line(folder, run):
    assert main(tiny_run.command(folder, f"--workdir={folder / 'other'}")) == 0
    assert tiny_run.losses(folder / "other") == tiny_run.losses(run.workdir)
    assert [line["loss"] for line in run.metrics.train] == tiny_run.losses(run.workdir)
    assert run.report.exists() and run.config["train"]["num_updates"] == 6


def test_evaluation_is_that_of_the_run(run):
    last = run.metrics.evaluate[-1]
    assert run.evaluate() == pytest.approx({name: last[name] for name in run.evaluate()}, rel=1e-5)


def test_generation_is_that_of_the_command_line(run, capsys):
    text = run.generate("river", max_tokens=5, seed=3)
    words = [
        "--mode=generate",
        "--prompt=river",
        "--config.generate.max_tokens=5",
        "--config.generate.seed=3",
    ]
    assert main(["llmjax", f"--workdir={run.workdir}", *words]) == 0
    assert capsys.readouterr().out == f"river{text}\n"
    assert llmjax.load(run.workdir, checkpoint="best").generate("river", max_tokens=5, seed=3) is not None


def test_several_samples_are_a_list_that_begins_with_the_one(run, capsys):
    settings = {"max_tokens": 8, "temperature": 2.0, "top_p": 1.0}
    texts = run.generate("river", num_samples=3, **settings)
    assert len(set(texts)) == 3 and texts[0] == run.generate("river", **settings)
    assert run.generate("river", num_samples=1, **settings) == texts[:1]
    with pytest.raises(UserError, match="generate.num_samples=0"):
        run.generate("river", num_samples=0)


def test_a_long_prompt_is_noted_once_for_each_loaded_run(run, capsys):
    loaded = llmjax.load(run.workdir)
    for _ in range(2):
        loaded.generate("river " * 10)
    assert capsys.readouterr().err.count("data.seq_len=32") == 1


def test_a_score_is_the_sum_over_the_text_whatever_else_is_scored(run):
    text = "春江 stone"
    score = run.score(text)
    assert score["tokens"] == len(text.encode()) + 1
    assert score["loss"] * score["tokens"] == pytest.approx(
        score["bits_per_byte"] * np.log(2) * len(text.encode())
    )
    assert run.score(text) == score != run.score("stone")
    long = "light cloud " * 40  # more than a sequence
    assert run.score(long)["tokens"] == len(long) + 1


def test_a_config_may_be_a_config_dict(folder):
    config = base.get_config()
    config.train.num_updates = 2
    settings = {key: value for key, value in changes(folder).items() if key != "train.num_updates"}
    run = llmjax.train(config, settings, workdir=folder / "dict")
    assert len(run.metrics.train) == 2
    with pytest.raises(UserError, match="workdir is not given"):
        llmjax.train(config, settings)


def test_a_run_of_an_older_version_is_loaded_with_the_keys_of_today(run, tmp_path):
    shutil.copytree(run.workdir, tmp_path / "old")
    saved = json.loads((tmp_path / "old" / "config.json").read_text())
    del saved["data"]["source_len"], saved["adamw"]
    saved["optimizer"] |= {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
    old = llmjax.load(tmp_path / "old")
    assert old.config == run.config and old.score("river") == run.score("river")


def test_other_documents_than_those_of_the_run_are_named(run, folder, capsys):
    path = folder / "corpus" / "zzz.txt"
    path.write_text("another document")
    run.evaluate()
    path.unlink()
    assert "these scores are of the documents here" in capsys.readouterr().out


def test_mistakes_are_one_sentence(folder, tmp_path, run):
    with pytest.raises(
        UserError, match="optimizer.lr is not known; did you mean --config.optimizer.learning_rate"
    ):
        llmjax.train("base", {"optimizer.lr": 1}, workdir=tmp_path)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        llmjax.load(tmp_path)
    with pytest.raises(UserError, match="nothing to score"):
        run.score("")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        llmjax.trian  # noqa: B018


WRONG = {
    "text to score": (lambda run: run.score(5), "text=5 is no text", "give one str"),
    "several texts": (lambda run: run.score(["a"]), r"text=\['a'\] is no text", "call again"),
    "half a character": (lambda run: run.score("a\ud800"), "surrogate U\\+D800 at character 1", "remove or replace"),
    "prompt": (lambda run: run.generate(None), "prompt=None is no text", "give one str"),
    "several prompts": (lambda run: run.generate(["a", "b"]), r"prompt=\['a', 'b'\] is no text", "call again"),
    "setting": (lambda run: run.generate(temperature=None), "generate.temperature=None is not one", "give one value"),
    "workdir": (lambda run: llmjax.load(None), "workdir=None is no path", "such as 'runs/mine'"),
    "workdir of a new run": (lambda run: llmjax.train("base", workdir=5), "workdir=5 is no path", "such as"),
    "config": (lambda run: llmjax.train(None), "config=None is no config", "such as 'base'"),
    "changes": (lambda run: llmjax.train("base", "a=3"), "changes='a=3' is no dict", "give keys with their values"),
    "key": (lambda run: llmjax.train("base", {3: 3}), "changes has the key 3", "such as 'train.num_updates'"),
    "several values": (lambda run: llmjax.train("base", {"train.num_updates": [3, 4]}), r"num_updates=\[3, 4\] is not",
                       "give one value"),
    "no values": (lambda run: llmjax.train("base", {"train.num_updates": []}), r"num_updates=\[\] is not one value",
                  "leave the key out"),
    "None": (lambda run: llmjax.train("base", {"checkpoint.init_from": None}), "init_from=None is not one value",
             "leave the key out"),
    "None for a list": (lambda run: llmjax.train("base", {"data.sources": None}), "sources=None is not a list",
                        "leave the key out"),
    "typo with a list": (lambda run: llmjax.train("base", {"data.source": ["a"]}), "data.source is not known",
                         "did you mean --config.data.source"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_an_argument_of_the_wrong_kind_is_named_with_its_remedy(kind, run):
    call, what, remedy = WRONG[kind]
    with pytest.raises(UserError, match=f"{what}.*{remedy}"):
        call(run)


@pytest.mark.parametrize("first", ["import llmjax.train.config", "import llmjax.api", "import llmjax"])
def test_train_is_called_whatever_was_imported_before(first):
    code = f"{first}; import llmjax; assert callable(llmjax.train); llmjax.load"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tiny_run.ROOT)


def test_importing_llmjax_imports_no_jax():
    subprocess.run([sys.executable, "-c", "import llmjax, sys; assert 'jax' not in sys.modules"], check=True)
