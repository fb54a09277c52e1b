"""Every task has the same loss however its work is divided, and a complete run of it works."""

import functools
import json
import math
import random
import types

import jax
import numpy as np
import pytest
import tiny_run
from families import families_for

from configs import base
from llmjax.build.corpus import make_corpus
from llmjax.build.labels import with_labels
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.packing.make_plan import plan_packing
from llmjax.main import main
from llmjax.tasks.contract import Totals
from llmjax.tasks.table import TASKS

# Each task with a family for each form of its examples.
CASES = [(task, family) for task in TASKS for family in families_for(task)]


def write_rows(folder, task):
    """A corpus of JSON lines with random words in the fields that tasks read."""
    rng, fields = random.Random(0), ("text", "source")
    rows = [
        {name: " ".join(rng.choices(tiny_run.WORDS, k=rng.randint(2, 6))) for name in fields}
        for _ in range(200)
    ]
    for row in rows:
        row["label"] = rng.choice(tiny_run.WORDS[:3])
        row["prompt"], row["rejected"] = row["source"][:16], row["label"]
        if task == "conversation":
            row["text"] = [row["source"], row["text"]]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def program_for(folder, task, family, devices, **changes):
    raw = base.get_config()
    settings = tiny_run.SETTINGS | {"task.name": task, "data.sources": (str(folder / "corpus"),),
                                    "data.cache_dir": str(folder / "cache"), "transformer.num_heads": 2,
                                    "data.seq_len": 64, "model.family": family}  # fmt: skip
    raw.update_from_flattened_dict(
        settings | {key.replace("__", "."): value for key, value in changes.items()}
    )
    config, derived = with_labels(*resolve_config(read_config(raw.to_dict()), len(devices)))
    corpus = make_corpus(config, derived)
    program = make_program(
        config, derived, corpus.tokenizer.vocab_size, devices, vocabulary=corpus.vocabulary
    )
    return program, corpus


def one_update(program, corpus):
    """The loss sums of the first update, and the parameters after it."""
    state, sums = program.init(), []
    inputs = program.steering.decide(program.steering.start(), 0).inputs
    with program.placement.batches(corpus.train) as batches:
        for _ in range(program.batch.accumulation_steps):
            state, metrics = program.train_step(state, next(batches), inputs)
            sums.append(jax.device_get(metrics))
    total = {name: sum(float(one[name]) for one in sums) for name in ("loss", "weight", "accuracy")}
    return total, jax.device_get(state.params)


@pytest.mark.parametrize("task, family", CASES)
def test_every_task_gives_the_same_update_however_its_work_is_divided(task, family, tmp_path):
    write_rows(tmp_path, task)
    make = functools.partial(program_for, tmp_path, task, family)
    whole, params = one_update(*make(jax.devices()[:1], compute__accumulation_steps=1))
    cut, others = one_update(*make(jax.devices()[:4], mesh__seq=2, compute__accumulation_steps=4))
    assert whole["weight"] == cut["weight"] > 0
    assert cut == pytest.approx(whole, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, others)


@pytest.mark.parametrize("task, family", CASES)
def test_a_run_of_every_task_reports_its_scores_and_keeps_the_best(task, family, tmp_path):
    write_rows(tmp_path, task)
    workdir = tmp_path / "work"
    settings = {"task__name": task, "data__seq_len": 64, "compute__accumulation_steps": 1}
    settings["model__family"] = family
    main(tiny_run.command(tmp_path, f"--workdir={workdir}", **settings))
    scores = TASKS[task].scores
    assert [score["name"] for score in json.loads((workdir / "scores.json").read_text())] == [
        s.name for s in scores
    ]
    evaluations = [line for line in tiny_run.read_lines(workdir) if line["kind"] == "evaluate"]
    assert evaluations and all(score.name in line for score in scores for line in evaluations)
    assert scores[0].label in (workdir / "report.html").read_text().lower()


def test_the_copy_task_gives_weight_to_the_copies_alone(tmp_path):
    tiny_run.write_corpus(tmp_path / "corpus", 60, words=6)
    program, corpus = program_for(tmp_path, "copy", "gpt", jax.devices()[:1])
    store, plan = corpus.store, corpus.held_out_plan
    with program.placement.batches(corpus.held_out, stop=plan.num_rows, batch_size=1) as batches:
        weight = sum(float(np.sum(batch.weights)) for batch in batches)
    # Of n tokens `bos text bos text eos`, the second text and eos have weight.
    assert weight == sum((int(store.lengths[doc]) - 1) // 2 for doc in corpus.held_out_ids)
    alone = plan_packing(store.lengths, corpus.held_out_ids, program.batch.seq_len, 0)
    assert alone.num_tokens > weight and isinstance(TASKS["copy"].scores[0].higher_is_better, bool)


@pytest.mark.parametrize("task", TASKS)
def test_no_score_ranks_a_model_that_computes_nothing_above_others(task):
    totals = Totals(
        loss=math.nan, weight=8.0, num_bytes=8,
        metrics={"accuracy": 4.0, "confusion": np.eye(2), "calibration": np.ones((3, 10))},
    )  # fmt: skip
    best = TASKS[task].scores[0]
    assert math.isnan(TASKS[task].evaluate(totals)[best.name])


def test_the_best_checkpoint_of_the_copy_task_has_the_highest_accuracy():
    best = TASKS["copy"].scores[0]
    values = [types.SimpleNamespace(accuracy=a) for a in (0.2, 0.9, 0.5)]
    assert min(values, key=lambda v: best.rank(v.accuracy)).accuracy == 0.9
