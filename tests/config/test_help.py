"""What --help shows, and that names of other codebases lead to keys of ours."""

import dataclasses

import pytest

from llmjax.config.help import SYNONYMS, describe_keys, key_comments, meant_keys
from llmjax.config.schema import Config
from llmjax.errors import UserError
from llmjax.flags import describe_help

KEYS = [
    f"{section}.{key}" if section else key for section, keys in key_comments().items() for key, _, _ in keys
]


def test_help_lists_every_key_with_its_comment():
    text, sections = describe_keys(), {field.name for field in dataclasses.fields(Config)}
    assert set(key_comments()) - {""} == sections - {"seed"}
    for section, keys in key_comments().items():
        for key, value, comment in keys:
            assert f"--config.{section}.{key}={value}".replace("..", ".") in text and comment in text


def test_help_of_one_section_and_of_none():
    assert "--config.data.seq_len=512" in describe_keys("data") and "optimizer" not in describe_keys("data")
    with pytest.raises(
        UserError, match="--help=optimiser names no section or key of the config; did you mean 'optimizer'"
    ):
        describe_keys("optimiser")
    with pytest.raises(UserError, match="there are model, "):
        describe_keys("qqqqqq")


@pytest.mark.parametrize("asked", ["learning_rate", "lr", "optimizer.lr", "optimizer.learning_rate"])
def test_help_of_a_key_by_any_of_its_names(asked):
    text = describe_keys(asked)
    assert "--config.optimizer.learning_rate=" in text and len(text.splitlines()) == 2


def test_help_may_have_its_section_behind_a_space_or_none():
    assert describe_help(["llmjax", "--help", "mesh"], "") == describe_keys("mesh")
    for words in ["--help=", "--mode=plan"], ["--help", "--mode=plan"]:
        assert describe_help(["llmjax", *words], "opening").startswith("opening")


def test_help_gives_each_flag_one_line():
    flags = describe_help(["llmjax", "--help"], "").split("flags\n")[1].split("\n\n")[0]
    assert all(line.startswith("  --") for line in flags.splitlines())


@pytest.mark.parametrize("word", ["--help", "-h", "-help", "--help=mesh"])
def test_help_is_asked_for_in_every_usual_way(word):
    text = describe_help(["llmjax", "--config=x", word], "opening")
    assert ("--config.mesh.seq=1" in text) and (("--prompt_file" in text) == (word != "--help=mesh"))


def test_help_is_not_asked_for():
    assert describe_help(["llmjax", "--config=base", "--prompt=--help me"], "") is None


def test_synonyms_are_of_keys_that_there_are():
    names = {key.split(".")[-1] for key in KEYS}
    assert set(SYNONYMS) <= names
    synonyms = {word for words in SYNONYMS.values() for word in words.split()}
    assert not names & synonyms - {"batch_size", "window", "path"}


@pytest.mark.parametrize("asked, meant", [
    ("optimizer.lr", "optimizer.learning_rate"), ("lr", "optimizer.learning_rate"), ("n_layer", "model.num_layers"),
    ("model.n_head", "transformer.num_heads"), ("d_model", "model.model_dim"), ("hidden_size", "model.model_dim"),
    ("block_size", "data.seq_len"), ("model.num_layer", "model.num_layers"), ("max_iters", "train.num_updates"),
    ("gradient_accumulation_steps", "compute.accumulation_steps"), ("num_layers", "model.num_layers"),
    ("train.batch_size", "train.tokens_per_update"), ("evaluate.eval_interval", "evaluate.every"),
    ("checkpoint.save_every", "checkpoint.every"), ("learning_rat", "optimizer.learning_rate"),
    ("num_epochs", "train.num_updates"),
])  # fmt: skip
def test_the_words_of_other_codebases_are_understood(asked, meant):
    assert meant_keys(asked, KEYS)[0] == meant


def test_what_is_near_to_nothing_is_not_guessed():
    assert meant_keys("zzzzzz", KEYS) == []
