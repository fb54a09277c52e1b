"""Reads what the files of a workdir say about its run, for the report. Any of the files may be missing or damaged."""

import dataclasses
import json
import pathlib

from llmjax.scores import confusion
from llmjax.scores.score import Score, read_scores
from llmjax.workdir import samples
from llmjax.workdir.metrics import Metrics, read_metrics
from llmjax.workdir.samples import Sample, read_samples

# The keys of an evaluation in metrics.jsonl that are not scores.
NO_SCORES = ("update", "tokens", "seconds", "kind")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir says about its run.

    name      the name of the workdir
    config    the resolved config, from config.json; empty if there is none
    metrics   the lines of metrics.jsonl
    summary   title, plan, results and commands from summary.json, which the end of training writes
    samples   the texts that the run sampled, the newest last
    troubles  one sentence for each file that exists and cannot be read or shown
    probes    the results of the probes of long context, from probes.json
    classes   the confusion matrix of the newest evaluation, from classes.json
    scores    the names, units and directions of the scores of an evaluation, the main score first
    """

    name: str
    config: dict
    metrics: Metrics
    summary: dict
    samples: list[Sample]
    troubles: list[str]
    probes: dict = dataclasses.field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    classes: dict = dataclasses.field(default_factory=dict)


def read_run(workdir: pathlib.Path) -> Run:
    """Reads all files of `workdir` that the report shows. A missing or damaged file raises no error."""
    troubles: list[str] = []
    metrics = read_metrics(workdir / "metrics.jsonl")
    if metrics.unreadable:
        troubles.append(f"metrics.jsonl: {metrics.unreadable:,} unreadable lines were left out.")
    names = ("config.json", "summary.json", "probes.json", confusion.FILE)
    config, summary, probes, classes = (_read_dict(workdir / name, troubles) for name in names)
    scores = read_scores(workdir) or _scores_without_a_file(metrics)
    texts = _read_samples(workdir, troubles)
    return Run(workdir.resolve().name, config, metrics, summary, texts, troubles, probes, scores, classes)


def _read_samples(workdir: pathlib.Path, troubles: list[str]) -> list[Sample]:
    """The sampled texts, with a sentence added to `troubles` about lines that cannot be read."""
    texts, unreadable = read_samples(workdir)
    if unreadable:
        troubles.append(f"{samples.FILE}: {unreadable:,} unreadable lines were left out.")
    if (workdir / samples.OLD_FILE).exists():
        troubles.append(f"{samples.OLD_FILE} was written by an older version and is not shown here.")
    return texts


def _scores_without_a_file(metrics: Metrics) -> tuple[Score, ...]:
    """Scores made of the keys of the last evaluation, for a workdir of an older version, which wrote no scores.json."""
    line = metrics.evaluate[-1] if metrics.evaluate else {}
    names = [key for key, value in line.items() if isinstance(value, float) and key not in NO_SCORES]
    loss = Score("loss", "held-out loss", "nats per token")
    return tuple(loss if name == "loss" else Score(name, name.replace("_", " ")) for name in names)


def _read_dict(path: pathlib.Path, troubles: list[str]) -> dict:
    """The JSON object in a file, or an empty dict if there is no such file.

    If the file holds no JSON object, the dict is empty too and a sentence is added to `troubles`.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        troubles.append(f"{path.name} cannot be read: {error}")
        return {}
    if isinstance(content, dict):
        return content
    troubles.append(f"{path.name} holds no table of keys and values.")
    return {}
