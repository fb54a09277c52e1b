"""Runs as a user starts them: what a workdir holds, what a second start does, evaluation and generation from it."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import tiny_run
from event_files import read_texts
from fake_wandb import Wandb
from sections import section
from tiny_run import CHINESE, command

from llmjax import main
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.modes.plan import planned_vocab_size
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.workdir.samples import read_samples

PROMISED = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "report.html",
    "tokenizer/tokenizer.json",
)


def run(capsys, words, code=0):
    """What a run that must end with this exit code, and without a complaint, prints."""
    ended = main.main(words)
    out, err = capsys.readouterr()
    assert (ended, err) == (code, ""), err
    return out


def refuse(capsys, words):
    """The sentence with which a start is refused."""
    assert main.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """These runs are mostly of one and the same program."""
    with tiny_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """English with Chinese between; one file is empty."""
    folder = tmp_path_factory.mktemp("modes")
    tiny_run.write_corpus(folder / "corpus", text=f"\n{CHINESE}\n")
    (folder / "corpus" / "empty.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def told(folder):
    """What a first run of 6 updates in `folder`/trained prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main.main(command(folder, f"--workdir={folder / 'trained'}")) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def trained(folder, told):
    """Its workdir: not to be written to."""
    return folder / "trained"


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_leaves_what_is_promised(trained):
    for name in PROMISED:
        assert (trained / name).stat().st_size, name
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["4", "6"]
    assert json.loads((trained / "config.json").read_text())["transformer"]["head_dim"] == 8  # resolved
    assert not list(trained.rglob("*.tmp"))


def test_the_metrics_have_every_update_once(trained):
    lines = tiny_run.read_lines(trained)
    assert [line["update"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["update"] for line in lines if line["kind"] == "evaluate"] == [3, 6]
    for line in lines:
        assert math.isfinite(line["loss"]) and line["tokens"] == 512 * line["update"]
    evaluation = lines[-1]
    assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["loss"]))
    assert evaluation["loss"] < lines[0]["loss"]


def test_the_plan_comes_first_and_the_results_last(told):
    plan, rest = told.split("ready after")
    for label in (
        "corpus",
        "tokenizer",
        "packing",
        "model",
        "optimizer",
        "mesh",
        "batch",
        "memory",
        "updates",
        "output",
    ):
        assert re.search(rf"^  {label} ", plan, re.M), label
    assert "40 documents" in plan and "1 empty" in plan
    assert "8 sequences x 32 tokens x 2 micro-steps = 512 tokens per update" in plan
    assert "data=8 x fsdp=1 x seq=1 x tensor=1 on 8 cpu devices" in plan
    assert re.search(r"^update 1/6  loss \d", rest, re.M)
    for label in (
        "held-out loss",
        "perplexity",
        "bits per byte",
        "gzip",
        "xz",
        "report",
        "resume",
        "generate",
    ):
        assert re.search(rf"^  {label} ", rest.split("done after")[1], re.M), label
    assert "the model continued" in rest


def test_tensorboard_shows_the_texts_that_the_run_sampled(trained):
    samples, _ = read_samples(trained)
    shown = read_texts(trained)
    assert [update for update, _, _ in shown] == [sample.update for sample in samples]
    for sample, (_, _, text) in zip(samples, shown):
        assert sample.text.split("\n")[0] in text and sample.prompt.split("\n")[0] in text


def test_the_same_command_again_trains_nothing_and_tells_the_end_again(folder, workdir, capsys, monkeypatch):
    before = {
        name: (workdir / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "config.json")
    }

    def make_run(*args):
        return dataclasses.replace(original(*args), step=lambda state, batch: pytest.fail("a step was taken"))

    original = tiny_run.in_modes("make_run")
    tiny_run.replace_in_modes(monkeypatch, "make_run", make_run)
    out = run(capsys, command(folder, f"--workdir={workdir}"))
    assert {name: (workdir / name).read_bytes() for name in before} == before
    assert "6 of them done" in out and "the model continued" in out
    final = tiny_run.read_lines(workdir)[-1]
    assert f"{final['loss']:.4f} nats per token" in out


def test_more_updates_go_on_where_the_run_ended_and_need_only_the_workdir(folder, workdir, capsys):
    done = (workdir / "metrics.jsonl").read_text()
    samples = (workdir / "samples.jsonl").read_text()
    run(capsys, ["llmjax", f"--workdir={workdir}", "--config.train.num_updates=9"])
    assert (workdir / "metrics.jsonl").read_text().startswith(done)
    assert (workdir / "samples.jsonl").read_text().startswith(samples)
    lines = tiny_run.read_lines(workdir)
    assert [line["update"] for line in lines if line["kind"] == "train"] == [*range(1, 10)]
    assert [line["update"] for line in lines if line["kind"] == "evaluate"] == [3, 6, 9]
    assert json.loads((workdir / "config.json").read_text())["train"]["num_updates"] == 9
    assert "9 of them done" in run(capsys, ["llmjax", f"--workdir={workdir}"])
    assert "9 of them done" in run(capsys, command(folder, f"--workdir={workdir}"))  # of 6: nothing is undone
    assert tiny_run.read_lines(workdir) == lines


def test_a_run_is_told_to_wandb_and_has_the_losses_that_it_has_without(
    folder, trained, tmp_path, capsys, monkeypatch
):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    workdir = tmp_path / "run"
    run(capsys, command(folder, f"--workdir={workdir}", metrics__wandb="offline"))
    assert tiny_run.losses(workdir) == tiny_run.losses(trained)
    (told,) = wandb.runs
    assert told.settings["config"] == json.loads((workdir / "config.json").read_text())
    samples, _ = read_samples(workdir)
    assert [line["samples"][0]["text"] for line in told.logged if "samples" in line] == [
        sample.text.encode("utf-8", "backslashreplace").decode() for sample in samples
    ]
    assert told.results["updates"] == 6
    assert told.results["held_out/loss"] == tiny_run.read_lines(workdir)[-1]["loss"]
    run(capsys, ["llmjax", f"--workdir={workdir}", "--config.train.num_updates=8"])
    assert wandb.runs[1].settings["id"] == told.settings["id"]
    run(capsys, ["llmjax", f"--workdir={workdir}", "--config.metrics.wandb=", "--config.train.num_updates=9"])
    assert len(wandb.runs) == 2


def test_a_package_that_is_missing_is_named_before_anything_is_read(folder, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    tiny_run.replace_in_modes(monkeypatch, "read_corpus", lambda *args: pytest.fail("it went on"))
    words = command(folder, f"--workdir={tmp_path / 'run'}", metrics__wandb="online")
    assert "metrics.wandb='online' needs the package wandb, which is not installed" in refuse(capsys, words)
    assert not (tmp_path / "run").exists()


def test_a_profile_of_a_run_that_goes_on_is_of_updates_to_come(folder, workdir, capsys):
    going_on = ["llmjax", f"--workdir={workdir}", "--config.train.num_updates=9"]
    sentence = refuse(capsys, [*going_on, "--profile=6:8"])
    assert (
        "--profile=6:8 begins with update 6, and the run goes on after update 6; begin with 7 or" in sentence
    )
    out = run(capsys, [*going_on, "--profile=8:10"])
    assert f"profile: updates 8 to 9 are in {workdir / 'profile'}; open it by xprof" in out
    assert len([*(workdir / "profile").rglob("perfetto_trace.json.gz")]) == 1


@pytest.mark.slow
def test_another_cut_of_the_work_gives_the_same_losses(folder, workdir, capsys, tmp_path):
    run(capsys, command(folder, f"--workdir={workdir}", train__num_updates=9))
    other = shutil.copytree(folder / "trained", tmp_path / "other")
    settings = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__seq": 2, "mesh__tensor": 1, "compute__accumulation_steps": 4,
                "compute__scan_layers": True, "compute__remat": "full"}  # fmt: skip
    run(capsys, command(folder, f"--workdir={other}", train__num_updates=9, **settings))
    assert tiny_run.losses(other) == pytest.approx(tiny_run.losses(workdir), rel=1e-5)


@pytest.mark.parametrize("which, update", [("latest", 6), ("best", 6), ("4", 4)])
def test_evaluation_repeats_what_the_run_measured(which, update, trained, capsys):
    words = ["llmjax", f"--workdir={trained}", "--mode=evaluate", f"--checkpoint={which}"]
    out = run(capsys, words)
    assert f"update {update} of {trained}" in out
    if update == 6:
        assert f"{tiny_run.read_lines(trained)[-1]['loss']:.4f} nats per token" in out
    for label in ("perplexity", "bits per byte", "gzip", "xz"):
        assert re.search(rf"^  {label} ", out, re.M), label


def test_probes_are_run_at_the_end_told_written_and_drawn(folder, workdir, capsys):
    probes = "--config.evaluate.probes=position,context,copy"
    out = run(capsys, ["llmjax", f"--workdir={workdir}", probes])  # its updates are done
    for label in ("loss by position", "loss by context", "copy at distance"):
        assert re.search(rf"^  {label} .*\d: ", out, re.M), label
    written = json.loads((workdir / "probes.json").read_text())
    assert list(written) == ["update", "position", "context", "copy"] and written["update"] == 6
    losses, targets = (np.array(written["position"][key]) for key in ("loss", "targets"))
    whole = tiny_run.read_lines(workdir)[-1]["loss"]
    assert (losses * targets).sum() / targets.sum() == pytest.approx(whole, rel=1e-6)
    assert "Is the long context used?" in (workdir / "report.html").read_text()


def test_evaluation_probes_the_checkpoint_that_is_asked_for(workdir, capsys):
    longer = ("--config.evaluate.probes=needle", "--config.evaluate.probe_lengths=192")
    out = run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=evaluate", "--checkpoint=4", *longer])
    assert re.search(r"^  needle, en +192: \d+% chosen \(chance 25%\)", out, re.M)
    written = json.loads((workdir / "probes.json").read_text())
    assert written["update"] == 4 and written["needle"][0]["length"] == [192]
    assert '<h3>Needle</h3><span class="unit">English' in (workdir / "report.html").read_text()


def test_probes_that_cannot_be_had_are_refused_before_anything_compiles(
    folder, tmp_path, capsys, monkeypatch
):
    tiny_run.replace_in_modes(monkeypatch, "make_program", lambda *args, **kwargs: pytest.fail("it went on"))
    words = command(folder, f"--workdir={tmp_path / 'run'}", evaluate__probes="passkey")
    assert "evaluate.probes has 'passkey', whose sentences take" in refuse(capsys, words)
    words = command(folder, f"--workdir={tmp_path / 'run'}", evaluate__probes="postion")
    assert "did you mean 'position'" in refuse(capsys, words)


def test_a_checkpoint_that_is_not_there_is_named(trained, capsys):
    for mode in ("evaluate", "generate"):
        words = ["llmjax", f"--workdir={trained}", f"--mode={mode}"]
        assert "there is no checkpoint of update 7" in refuse(capsys, [*words, "--checkpoint=7"])
        assert "--checkpoint='newest' is neither latest, best, the" in refuse(
            capsys, [*words, "--checkpoint=newest"]
        )


def flip_a_bit(checkpoint):
    """In the middle of its largest file of arrays."""
    file = max((checkpoint / "state").glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_serves(folder, workdir, capsys):
    """First whoever reads, who moves nothing; then training, which makes up for it."""
    flip_a_bit(workdir / "checkpoints" / "6")
    evaluate = ["llmjax", f"--workdir={workdir}", "--mode=evaluate"]
    assert main.main(evaluate) == 0
    out, err = capsys.readouterr()
    assert f"update 4 of {workdir}" in out and err.count("\n") == 1
    damaged = f"the checkpoint of update 6 in {workdir / 'checkpoints'} is damaged ("
    assert damaged in err and err.endswith("the one of update 4 takes its place\n")
    assert damaged in refuse(capsys, [*evaluate, "--checkpoint=6"])
    expected = tiny_run.read_lines(workdir)
    assert main.main(command(folder, f"--workdir={workdir}")) == 0
    out, err = capsys.readouterr()
    assert "4 of them done" in out and damaged in err and "was set aside as damaged-6" in err
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6", "damaged-6"]
    assert tiny_run.read_lines(workdir) == expected


def test_checkpoints_that_are_gone_are_refused_and_nothing_is_touched(folder, workdir, capsys):
    (workdir / "checkpoints").rename(workdir.parent / "unmounted")
    before = (workdir / "metrics.jsonl").read_bytes()
    sentence = refuse(capsys, command(folder, f"--workdir={workdir}"))
    assert "holds no checkpoint, although saved.json says that checkpoints/6 was saved; mount or" in sentence
    assert (workdir / "metrics.jsonl").read_bytes() == before and not (workdir / "lock").exists()


def generate(capsys, workdir, *words):
    return run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=generate", *words])


def test_greedy_text_is_the_same_each_time_and_begins_with_the_prompt(trained, capsys):
    greedy = ("--prompt=river stone", "--config.generate.temperature=0")
    first = generate(capsys, trained, *greedy)
    assert first.startswith("river stone") and len(first) > len("river stone\n")
    assert generate(capsys, trained, *greedy) == first


def test_sampled_text_follows_the_seed(trained, capsys):
    sampled = ("--prompt=river stone", "--config.generate.temperature=2.0", "--config.generate.top_p=1",
               "--config.generate.max_tokens=20")  # fmt: skip
    first = generate(capsys, trained, *sampled)
    assert generate(capsys, trained, *sampled) == first
    assert generate(capsys, trained, *sampled, "--config.generate.seed=5") != first


def test_several_prompts_are_continued_one_by_one(trained, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("春江\nlight code", encoding="utf-8")
    out = generate(
        capsys, trained, "--prompt=river", f"--prompt_file={path}", "--config.generate.temperature=0"
    )
    assert re.findall(r"^--- (\d)\n(river|春江|light code)", out, re.M) == [
        ("1", "river"),
        ("2", "春江"),
        ("3", "light code"),
    ]
    alone = generate(capsys, trained, "--prompt=春江", "--config.generate.temperature=0")
    assert alone.rstrip("\n") in out


def test_samples_of_several_prompts_say_whose_they_are_and_begin_with_those_of_one(trained, capsys):
    words = (
        "--prompt=river",
        "--prompt=春江",
        "--config.generate.temperature=2",
        "--config.generate.top_p=1",
    )
    one = generate(capsys, trained, *words)
    out = generate(capsys, trained, *words, "--config.generate.num_samples=3")
    texts = re.split(r"^--- (\d), sample (\d) of 3\n", out, flags=re.M)
    assert texts[0] == "" and [*zip(texts[1::3], texts[2::3])] == [(p, s) for p in "12" for s in "123"]
    assert re.split(r"^--- \d\n", one, flags=re.M)[1:] == texts[3::9]
    assert len(set(texts[3::3])) == 6


@pytest.mark.parametrize("setting", ["temperature=0", "top_k=1"])
def test_samples_that_must_be_alike_get_one_note(setting, trained, capsys):
    words = ["llmjax", f"--workdir={trained}", "--mode=generate", "--config.generate.num_samples=2"]
    assert main.main([*words, "--prompt=a", "--prompt=b", f"--config.generate.{setting}"]) == 0
    out, err = capsys.readouterr()
    assert out.count("---") == 4 and err.count("\n") == 1
    assert f"generate.{setting} always takes the likeliest token" in err


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_prompt_longer_than_the_model_was_trained_on_gets_one_note(prompts, trained, capsys):
    words = ["llmjax", f"--workdir={trained}", "--mode=generate"]
    assert main.main([*words, *["--prompt=" + "river " * 10] * prompts]) == 0
    out, err = capsys.readouterr()
    assert out.count("river " * 10) == prompts and err.count("\n") == 1
    assert "the longest prompt has 61 tokens, and the model was trained on data.seq_len=32" in err
    assert generate(capsys, trained, "--prompt=" + "r" * 31)  # 32 tokens, with the one that begins a text


def test_without_a_prompt_there_is_still_text(trained, capsys):
    assert generate(capsys, trained, "--config.generate.temperature=0").strip()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A folder with a run whose tokenizer was trained on its Chinese and English."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    tiny_run.write_corpus(folder / "corpus", text=f"\n{CHINESE}\n")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(command(folder, f"--workdir={folder / 'run'}", **SENTENCEPIECE)) == 0
    return folder


def moved(folder, to):
    """A copy of a folder with corpus and runs, whose runs are of the copied corpus."""
    shutil.copytree(folder, to)
    for path in to.glob("*/config.json"):
        path.write_text(path.read_text().replace(f'"{folder}/', f'"{to}/'))
    return to


SENTENCEPIECE = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 400, "train__num_updates": 2}


def test_chinese_and_english_are_read_and_continued(sentencepiece, capsys):
    workdir = sentencepiece / "run"
    tokenizer = load_tokenizer(workdir / "tokenizer")
    assert tokenizer.vocab_size == 400 and len(tokenizer.encode("春江")) <= 2 < len("春江".encode())
    greedy = ("--prompt=river 春江潮水", "--config.generate.temperature=0")
    assert generate(capsys, workdir, *greedy).startswith("river 春江潮水")


def test_other_documents_under_a_run_are_refused_and_do_not_replace_its_tokenizer(
    sentencepiece, tmp_path, capsys
):
    folder = moved(sentencepiece, tmp_path / "folder")
    saved = (folder / "run" / "config.json").read_text()
    kept = (folder / "run" / "tokenizer" / "tokenizer.model").read_bytes()
    (folder / "corpus" / "new.txt").write_text("quite other words, zigzag and quartz, " * 50)
    words = command(folder, f"--workdir={folder / 'run'}", **SENTENCEPIECE | {"train__num_updates": 4})
    sentence = refuse(capsys, words)
    assert "new.txt new" in sentence and "another --workdir" in sentence
    assert (folder / "run" / "tokenizer" / "tokenizer.model").read_bytes() == kept
    assert (folder / "run" / "config.json").read_text() == saved


def test_the_vocabulary_is_known_before_the_corpus_is_read(sentencepiece):
    for config in (
        section("tokenizer", kind="byte"),
        section("tokenizer", path=str(sentencepiece / "run" / "tokenizer")),
    ):
        expected = 277 if config.kind == "byte" else 400
        assert planned_vocab_size(config) == expected
    assert planned_vocab_size(section("tokenizer", kind="bpe", vocab_size=5000)) == 5000


def bad_corpus(folder):
    tiny_run.write_corpus(folder / "corpus")
    (folder / "corpus" / "bad.txt").write_bytes(b"x" * 100 + b"\xff" + b" and so on" * 20)
    return folder


@pytest.mark.parametrize("choice, documents, said", [
    ("skip", 40, "1 skipped, being null or bad text"),
    ("replace", 41, "1 of bad text, mended with U+FFFD"),
])  # fmt: skip
def test_what_became_of_bad_text_is_said(choice, documents, said, tmp_path, capsys):
    words = command(bad_corpus(tmp_path), "--mode=plan", data__on_bad_text=choice)
    for _ in range(2):  # the second time from the cache
        out = run(capsys, words)
        assert f"{documents} documents," in out and said in out
        assert "compiled" in out and "per device: arguments" in out
    assert not (tmp_path / "runs").exists()


def test_other_documents_under_a_run_are_refused(trained, tmp_path, capsys):
    folder = moved(trained.parent, tmp_path / "folder")
    words = command(folder, f"--workdir={folder / 'trained'}", train__num_updates=7)
    (folder / "corpus" / "000.txt").write_text("another text than before, " * 5)
    metrics = (trained / "metrics.jsonl").read_bytes()
    sentence = refuse(capsys, words)
    assert "the documents behind data.sources are not those" in sentence and "another --workdir" in sentence
    assert (folder / "trained" / "metrics.jsonl").read_bytes() == metrics


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    settings = {"optimizer__learning_rate": 1e30, "optimizer__warmup_updates": 0, "checkpoint__every": 1,
                "evaluate__every": 0, "stability__max_skips": 2}  # fmt: skip
    assert main.main(command(folder, f"--workdir={workdir}", **settings)) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "the last 2 updates were all skipped or dropped" in err, err
    assert re.search(
        r"of update 2 was not finite and left out; by itself each document has a finite loss now; "
        r"documents \d+\.txt \[tokens \d+:\d+\]",
        out,
    )
    # Update 1 itself did the damage: its parameters give no finite loss.
    assert "the last good checkpoint is of update 0 in" in err and "lower optimizer.learning_rate" in err
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.updates() == [0] and checkpoints.latest_good() == 0
    assert (workdir / "report.html").exists()
    settings |= {"optimizer__learning_rate": 1e-3}
    out = run(capsys, command(folder, f"--workdir={workdir}", **settings))
    assert all(math.isfinite(loss) for loss in tiny_run.losses(workdir)) and "done after" in out
