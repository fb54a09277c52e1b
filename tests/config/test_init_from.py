"""Runs that begin with another's parameters: what they take over, what may differ, and when they need it no more."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from some_slow import often
from tiny_run import command

from llmjax import main
from llmjax.build.corpus import make_corpus
from llmjax.build.program import make_program
from llmjax.build.restore import resume_or_init
from llmjax.config.init_from import with_tokenizer
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.train.checkpoint.checkpoint import Checkpoints
from tests.modes.test_modes import SENTENCEPIECE, compile_once, refuse, run  # noqa: F401 - a fixture

YARN = {
    "transformer__rope_scaling": "yarn",
    "transformer__rope_factor": 2.0,
    "transformer__rope_original_len": 32,
}
LONGER = YARN | {"data__seq_len": 64, "train__tokens_per_update": 1024}  # than the 32 of a tiny run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial")
    tiny_run.write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def source(folder):
    """The workdir of a run of 6 updates, with checkpoints of 4 and 6."""
    assert main.main(command(folder, f"--workdir={folder / 'source'}")) == 0
    return folder / "source"


def extended(folder, workdir, source, *words, **settings):
    settings = LONGER | {"checkpoint__init_from": source} | settings
    return command(folder, f"--workdir={workdir}", *words, **settings)


def program_of(words, workdir):
    """What the command `words` would run, and the text it would run on."""
    from llmjax.flags import parse

    config, derived = resolve_config(read_config(parse(words)[1]), len(jax.devices()))
    corpus = make_corpus(with_tokenizer(config, workdir), derived)
    return make_program(config, derived, corpus.tokenizer.vocab_size), corpus


def held_out_loss(out):
    return out.split("held-out loss")[-1].split()[0]


def test_a_longer_run_begins_with_the_parameters_alone(folder, source, tmp_path):
    program, corpus = program_of(extended(folder, tmp_path, source), tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as own:
        state, position = resume_or_init(program, corpus, own, tmp_path)
    with Checkpoints(source / "checkpoints", read_only=True) as theirs:
        params, meta = theirs.restore_params(program.abstract_saved().params)
    assert (position.update, position.cursor, position.tokens, int(state.update), meta["update"]) == (
        0,
        0,
        0,
        0,
        6,
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    fresh = program.init()
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
    assert (jax.random.key_data(state.rng) == jax.random.key_data(fresh.rng)).all()
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
    assert corpus.train_plan.seq_len == 64


def test_it_is_scored_before_it_begins_and_better_after(folder, source, tmp_path, capsys):
    workdir = tmp_path / "run"
    last = tiny_run.read_lines(source)[-1]
    as_it_was = {
        "transformer__rope_scaling": "none",
        "transformer__rope_factor": 1.0,
        "transformer__rope_original_len": 0,
    }
    words = extended(folder, workdir, source, "--mode=evaluate", data__seq_len=32, **as_it_was)
    out = run(capsys, words)
    assert f"update 6 of {source}" in out and held_out_loss(out) == f"{last['loss']:.4f}"
    assert "--checkpoint=3 is of a run" in refuse(
        capsys, extended(folder, workdir, source, "--mode=evaluate", "--checkpoint=3")
    )
    before = run(capsys, extended(folder, workdir, source, "--mode=evaluate"))
    assert not workdir.exists()
    out = run(capsys, extended(folder, workdir, source))
    assert f"beginning with the parameters of update 6 of {source}" in out
    assert f"parameters and tokenizer of {source}, checkpoint latest" in out
    assert float(held_out_loss(out)) < float(held_out_loss(before))
    assert held_out_loss(run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=evaluate"])) == held_out_loss(
        out
    )


def test_once_it_has_a_checkpoint_it_goes_on_without_the_other(folder, source, tmp_path, capsys, monkeypatch):
    other, whole, parts = tmp_path / "other", tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(source, other)
    run(capsys, extended(folder, whole, other))
    polls = iter(range(100))
    monkeypatch.setattr("llmjax.train.loop.stop_request.StopRequest.poll", lambda self: next(polls) == 4)
    assert main.main(extended(folder, parts, other)) == 75
    assert "1 of 2 micro-steps of the next" in capsys.readouterr().out
    monkeypatch.undo()
    saved = json.loads((parts / "config.json").read_text())
    assert saved["checkpoint"]["init_from"] == str(other) and saved["tokenizer"]["path"] == ""
    shutil.rmtree(other)
    assert "beginning with" not in run(capsys, extended(folder, parts, other))
    assert tiny_run.read_lines(parts) == tiny_run.read_lines(whole)
    run(capsys, ["llmjax", f"--workdir={parts}"])  # the workdir is all it needs
    assert "holds a run of another config: checkpoint.init_from" in refuse(capsys, command(
        folder, f"--workdir={parts}", **LONGER
    ))  # fmt: skip


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_begins_again(folder, source, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(capsys, extended(folder, whole, source))
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints")
    for name in ("saved.json", "summary.json"):
        (parts / name).unlink()
    first, *_ = (parts / "metrics.jsonl").read_text().splitlines(keepends=True)
    (parts / "metrics.jsonl").write_text(first)
    assert "beginning with" in run(capsys, extended(folder, parts, source))
    assert tiny_run.read_lines(parts) == tiny_run.read_lines(whole)


@pytest.mark.parametrize(
    "which, update", often([("latest", 6), ("best", 6), ("4", 4)], lambda case: case[1] == 4)
)
def test_the_checkpoint_can_be_chosen(which, update, folder, source, tmp_path, capsys):
    words = extended(folder, tmp_path, source, "--mode=evaluate", checkpoint__init_checkpoint=which)
    assert f"update {update} of {source}" in run(capsys, words)


@pytest.mark.slow
def test_what_does_not_shape_parameters_may_differ(folder, source, tmp_path, capsys):
    settings = {"transformer__window": 24, "transformer__rope_theta": 5e4, "model__dropout": 0.1,
    "compute__scan_layers": True,
                "compute__remat": "full", "model__logit_softcap": 30.0, "compute__kernel": "full",
                "optimizer__name": "muon", "mesh__fsdp": 2, "compute__engine": "fused"}  # fmt: skip
    out = run(capsys, extended(folder, tmp_path / "run", source, train__num_updates=1, **settings))
    assert "update 1/1" in out


@pytest.mark.parametrize("name", often(["schedule_free_adamw", "adamw"], lambda name: name != "adamw"))
def test_averaged_parameters_are_what_it_begins_with(name, folder, tmp_path, capsys):
    averaged = {"optimizer__name": "schedule_free_adamw", "optimizer__schedule": "constant"}
    run(capsys, command(folder, f"--workdir={tmp_path / 'source'}", **averaged))
    last = tiny_run.read_lines(tmp_path / "source")[-1]
    settings = averaged if name == "schedule_free_adamw" else {}
    words = command(folder, f"--workdir={tmp_path / 'run'}", "--mode=evaluate",
                    checkpoint__init_from=tmp_path / "source", **settings)  # fmt: skip
    assert held_out_loss(run(capsys, words)) == f"{last['loss']:.4f}"


@pytest.mark.slow
def test_the_tokenizer_comes_along_whatever_the_documents_are(tmp_path, capsys):
    for name, text in (("a", ""), ("b", " quite other words, zigzag and quartz")):
        tiny_run.write_corpus(tmp_path / name / "corpus", text=text)
    run(capsys, command(tmp_path / "a", f"--workdir={tmp_path / 'a' / 'run'}", **SENTENCEPIECE))
    words = command(tmp_path / "b", f"--workdir={tmp_path / 'b' / 'run'}", **SENTENCEPIECE,
                    checkpoint__init_from=tmp_path / "a" / "run")  # fmt: skip
    run(capsys, words)
    theirs, ours = (load_tokenizer(tmp_path / name / "run" / "tokenizer").fingerprint for name in "ab")
    assert ours == theirs
    run(capsys, [*words, "--config.train.num_updates=4"])
    # Trained on the documents of b it would have been another one.
    run(capsys, command(tmp_path / "b", f"--workdir={tmp_path / 'b' / 'own'}", **SENTENCEPIECE))
    assert load_tokenizer(tmp_path / "b" / "own" / "tokenizer").fingerprint != theirs
    given = {"tokenizer__path": tmp_path / "b" / "own" / "tokenizer"}
    other = [*words, f"--workdir={tmp_path / 'b' / 'other'}"]
    assert "is not the tokenizer that the run in checkpoint.init_from" in refuse(
        capsys, [*other, f"--config.tokenizer.path={given['tokenizer__path']}"]
    )
    same = tmp_path / "a" / "run" / "tokenizer"
    run(capsys, [*other, f"--config.tokenizer.path={same}"])
    assert "tokenizer.vocab_size=500, but the run in checkpoint.init_from" in refuse(
        capsys, [*other, f"--workdir={tmp_path / 'b' / 'third'}", "--config.tokenizer.vocab_size=500"]
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"checkpoint__init_from": "nowhere"}, "checkpoint.init_from='nowhere' holds no trained run"),
        ({"model__model_dim": 32}, "model.model_dim=32, but the run in checkpoint.init_from=.* has 16"),
        ({"transformer__num_kv_heads": 1}, "transformer.num_kv_heads=1, but .* has 2"),
        ({"transformer__qk_norm": "false"}, "transformer.qk_norm=False, but .* has True"),
        ({"tokenizer__kind": "bpe"}, "tokenizer.kind='bpe', but .* has 'byte', and its tokenizer is used"),
        (
            {"checkpoint__init_checkpoint": "newest"},
            "checkpoint.init_checkpoint='newest' is neither latest, best",
        ),
        ({"checkpoint__init_checkpoint": "5"}, "there is no checkpoint of update 5 in .*; choose among 4, 6"),
        (
            {"checkpoint__init_from": "", "checkpoint__init_checkpoint": "best"},
            "checkpoint.init_checkpoint='best' has no meaning without checkpoint.init_from",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    settings, sentence, folder, source, tmp_path, capsys
):
    words = extended(folder, tmp_path / "run", source, **settings)
    assert re.search(sentence, refuse(capsys, words))
    assert not (tmp_path / "run").exists()


def test_learned_positions_cannot_be_extended(folder, tmp_path, capsys):
    run(
        capsys,
        command(
            folder, f"--workdir={tmp_path / 'source'}", transformer__position="learned", train__num_updates=1
        ),
    )
    learned = {"checkpoint__init_from": tmp_path / "source", "transformer__position": "learned"}
    for length in (64, 16):
        size = {"data__seq_len": length, "train__tokens_per_update": 16 * length}
        words = command(folder, f"--workdir={tmp_path / 'run'}", **size, **learned)
        assert (
            f"knows the 32 positions of the run in checkpoint.init_from='{tmp_path / 'source'}' and no others"
            in refuse(capsys, words)
        )
    run(capsys, command(folder, f"--workdir={tmp_path / 'run'}", train__num_updates=1, **learned))


def test_a_plan_for_a_topology_asks_for_no_run(monkeypatch, folder, capsys):
    tiny_run.replace_in_modes(monkeypatch, "topology_devices", lambda name: jax.devices())
    words = extended(folder, folder / "planned", "runs/not-there", "--mode=plan", plan__topology="v5e:2x4")
    assert "compiled" in run(capsys, words)
    here = extended(folder, folder / "planned", "runs/not-there", "--mode=plan")
    assert "checkpoint.init_from='runs/not-there' holds no trained run" in refuse(capsys, here)
