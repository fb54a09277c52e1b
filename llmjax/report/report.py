"""Writes report.html: a run as one self-contained page that can be sent to a colleague as it is.

The page is made from the files of a workdir alone, so it can be written while a run is going, after it was
killed, or years later on a machine without jax. It loads nothing: style, script and curves are inside, and a
content security policy forbids the rest. Without JavaScript only the read-out under the pointer is lost.
"""

import dataclasses
import html
import json
import pathlib
import re
from collections.abc import Callable

import numpy as np

from llmjax.files import write_atomically
from llmjax.report import chart_axes, charts, curves, markdown, probe_charts
from llmjax.scores import Score, read_scores
from llmjax.workdir.metrics import Metrics, column, number, read_metrics

# What an evaluation has beside its figures.
POSITION = ("update", "tokens", "seconds", "kind")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
EARLIER_SAMPLES = 10  # this many earlier rounds of samples stay in the page, folded
LONG = 12  # a table of more rows is folded


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir says about its run; all of it may be missing."""

    name: str
    config: dict
    metrics: Metrics
    summary: dict
    samples: list[tuple[str, str]]  # heading and body of each round
    troubles: list[str]  # files that are there but cannot be read
    probes: dict = dataclasses.field(default_factory=dict)
    scores: tuple[Score, ...] = ()


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `workdir`/report.html from config.json, metrics.jsonl, summary.json, probes.json and samples.md.

    Files that do not exist leave their section out; files that cannot be read are named on the page. The page
    replaces an older one in one step, so a reader never sees half of it.
    """
    path = pathlib.Path(workdir) / "report.html"
    page = make_page(read_run(pathlib.Path(workdir)))
    write_atomically(path, page)
    return path


def read_run(workdir: pathlib.Path) -> Run:
    """Reads what there is of a run."""
    troubles: list[str] = []
    metrics = read_metrics(workdir / "metrics.jsonl")
    if metrics.unreadable:
        troubles.append(f"metrics.jsonl: {metrics.unreadable:,} unreadable lines were left out.")
    config, summary, probes = (
        _read_dict(workdir / name, troubles) for name in ("config.json", "summary.json", "probes.json")
    )
    samples = workdir / "samples.md"
    text = samples.read_text(encoding="utf-8", errors="replace") if samples.exists() else ""
    scores = read_scores(workdir) or _scores_without_a_file(metrics)
    rounds = markdown.split_samples(text)
    return Run(workdir.resolve().name, config, metrics, summary, rounds, troubles, probes, scores)


def _scores_without_a_file(metrics: Metrics) -> tuple[Score, ...]:
    """The figures of the last evaluation, of which an older version has not written down what they are."""
    line = metrics.evaluate[-1] if metrics.evaluate else {}
    names = [key for key, value in line.items() if isinstance(value, float) and key not in POSITION]
    loss = Score("loss", "held-out loss", "nats per token")
    return tuple(loss if name == "loss" else Score(name, name.replace("_", " ")) for name in names)


def _read_dict(path: pathlib.Path, troubles: list[str]) -> dict:
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


# --- the page ---


def make_page(run: Run) -> str:
    """The whole page as one string."""
    here = pathlib.Path(__file__)
    style, script = (here.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = _title(run)
    sections = [_drawn(source, draw, run) for draw, source in SECTIONS.items()]
    subtitle = _drawn("metrics.jsonl", _subtitle, run)
    troubles = "".join(f'<p class="trouble">{html.escape(trouble)}</p>' for trouble in run.troubles)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>{troubles}</header>\n"
        + "\n".join(filter(None, sections))
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _title(run: Run) -> str:
    title = run.summary.get("title")
    return title if isinstance(title, str) and title else run.name


def _drawn(source: str, draw: Callable[[Run], str], run: Run) -> str:
    """What `draw` makes of a run, or nothing, and a word about `source`, where the file holds what nobody can draw."""
    try:
        return draw(run)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        run.troubles.append(f"{source} holds values that cannot be shown ({type(error).__name__}).")
        return ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}\n</section>" if body else ""


def _entries(value: object) -> dict[str, str]:
    """A table of the summary with everything in it as text; whatever is no table counts as empty."""
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def _table(entries: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(text)}</td></tr>'
        for key, text in entries.items()
    )
    return f'<table class="entries"><tbody>{rows}</tbody></table>' if rows else ""


def _subtitle(run: Run) -> str:
    """How far the run went: updates (of how many), tokens, time."""
    if not (run.metrics.train or run.metrics.evaluate or run.metrics.statistics):
        return "No updates yet."
    high = {axis.key: axis.high for axis in curves.positions(run.metrics).axes}
    section = run.config.get("train")
    planned = number(section.get("num_updates")) if isinstance(section, dict) else None
    of = f" of {planned:,.0f}" if planned and planned > high["updates"] else ""
    parts = [f"{high['updates']:,.0f}{of} update{'s' * (high['updates'] != 1 or bool(of))}"]
    if "tokens" in high:
        parts.append(f"{chart_axes.format_number(high['tokens'])} tokens")
    if "time" in high:
        parts.append(chart_axes.format_duration(high["time"]))
    return " · ".join(parts)


# --- results ---


def _tiles(run: Run) -> str:
    """The key figures: the last evaluation, what else the summary has, and the speed."""
    results = _entries(run.summary.get("results"))
    compressors = {
        label: text for label, text in results.items() if re.search(r"\b(gzip|xz)\b", label.lower())
    }
    tiles = _quality_tiles(run, compressors)
    for label, text in results.items():
        covered = run.metrics.evaluate and label.lower() in {score.label for score in run.scores}
        if not covered and (label not in compressors or not run.metrics.evaluate):
            tiles.append((label, text, ""))
    speed = column(run.metrics.train, "tokens_per_second")
    speed = speed[np.isfinite(speed)]
    if speed.size:
        mfu = column(run.metrics.train, "mfu")
        mfu = mfu[np.isfinite(mfu)]
        note = f"median, {100 * np.median(mfu):.1f}% of peak" if mfu.size else "median"
        tiles.append(("Tokens per second", chart_axes.format_number(float(np.median(speed))), note))
    body = "".join(
        f'<div class="tile"><dt>{html.escape(label)}</dt><dd><b>{html.escape(value)}</b>'
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for label, value, note in tiles
    )
    return f'<section aria-label="Key results"><dl class="tiles">{body}</dl></section>' if body else ""


def _quality_tiles(run: Run, compressors: dict[str, str]) -> list[tuple[str, str, str]]:
    """(label, value, note) for each measure of the last evaluation, or the train loss where there is none."""
    evaluate, tiles = run.metrics.evaluate, []
    if evaluate and run.scores and evaluate[-1].get(run.scores[0].name) is not None:
        first = run.scores[0]
        values = column(evaluate, first.name)
        finite = np.flatnonzero(np.isfinite(values))
        ranks = [first.rank(value) for value in values[finite]]
        best = int(finite[np.argmin(ranks)]) if finite.size else len(values) - 1
        word = "highest" if first.higher_is_better else "lowest"
        note = f"{word} {values[best]:.3f} at update {evaluate[best]['update']:,.0f}"
        label = first.label[:1].upper() + first.label[1:]
        tiles.append((label, f"{values[-1]:.3f}", first.unit if best == len(values) - 1 else note))
        for score in run.scores[1:]:
            value = evaluate[-1].get(score.name)
            if value is None:
                continue
            pattern = rf"[,:]? *{re.escape(score.label)}"
            comparable = any(
                re.search(pattern, f"{label} {text}", re.I) for label, text in compressors.items()
            )
            beside = " · ".join(
                f"{re.sub(pattern, '', label, flags=re.I)} {text}"
                for label, text in compressors.items()
                if comparable
            )
            text = f"{value:.3f}" if score.digits > 2 else chart_axes.format_number(value, 4)
            tiles.append((score.label[:1].upper() + score.label[1:], text, beside or score.unit))
    elif run.metrics.train:
        loss = column(run.metrics.train, "loss")
        if np.isfinite(loss).any():
            tiles.append(("Train loss", f"{loss[np.isfinite(loss)][-1]:.3f}", "nats per token, last update"))
    return tiles


# --- curves ---


def _curves(run: Run) -> str:
    """All charts under the one choice of axes."""
    loss = curves.loss_chart(run.metrics)
    known, others = curves.measure_charts(run.metrics)
    layers, more_layers = curves.layer_charts(run.metrics)
    if not (loss or known or others or layers or more_layers):
        return ""
    axes = curves.positions(run.metrics).axes
    grid = _grid(([loss] if loss else []) + known + layers, axes)
    for title, charts_of in (("layers", more_layers), ("measurements", others)):
        if charts_of:
            summary = f"<summary>More {title} ({len(charts_of)})</summary>"
            grid += f"\n<details>{summary}{_grid(charts_of, axes)}</details>"
    if max(len(run.metrics.train), len(run.metrics.evaluate)) > charts.POINTS_NARROW:
        grid += (
            f'<p class="note">Curves of more than {charts.POINTS_WIDE:,} points '
            f"({charts.POINTS_NARROW:,} in a narrow chart) are thinned to the lowest and "
            "the highest value among neighbours: no spike is lost.</p>"
        )
    names = {"updates": "Updates", "tokens": "Tokens", "time": "Time"}
    across = _switch("Horizontal axis", "x", [(axis.key, names[axis.key]) for axis in axes])
    up = _switch("Loss and gradient norm", "y", [("linear", "Linear"), ("log", "Log"), ("close", "Close-up")])
    return _section("Curves", f'<form class="controls" autocomplete="off">{across}{up}</form>\n{grid}')


def _grid(drawn: list[charts.Chart], axes: list[chart_axes.Axis]) -> str:
    return '<div class="grid">\n' + "\n".join(charts.draw_chart(chart, axes) for chart in drawn) + "\n</div>"


def _switch(legend: str, name: str, choices: list[tuple[str, str]]) -> str:
    """Radio buttons; the style sheet shows the drawings that belong to the checked ones."""
    buttons = "".join(
        f'<label><input type="radio" name="{name}" id="{name}-{key}"{" checked" * (i == 0)}>'
        f"<span>{text}</span></label>"
        for i, (key, text) in enumerate(choices)
    )
    return f"<fieldset><legend>{legend}</legend><div>{buttons}</div></fieldset>"


def _evaluations(run: Run) -> str:
    """Every evaluation as a row, with whatever else was measured as further columns."""
    lines = run.metrics.evaluate
    told = {score.name: score for score in run.scores}
    first = [key for key in ("update", "tokens", *told) if any(key in x for x in lines)]
    more = sorted(
        {key for line in lines for key, value in line.items() if isinstance(value, float)}
        - {*first, "seconds"}
    )
    keys = first + more
    if not lines:
        return ""

    def cell(key: str, value: float | None) -> str:
        if value is None:
            return "–"
        if key == "update":
            return f"{value:,.0f}"
        if key in told and told[key].digits > 2:
            return f"{value:.4f}"
        return chart_axes.format_number(value, 4)

    rows = [[cell(key, line.get(key)) for key in keys] for line in lines]
    table = _figures([key.replace("_", " ") for key in keys], rows)
    if len(lines) > LONG:
        table = f"<details><summary>All {len(lines):,} evaluations</summary>{table}</details>"
    return _section("Held-out evaluations", table)


def _events(metrics: Metrics) -> str:
    """What happened beside training, and each change of the batch with its reason."""
    counts = {key: float(np.nansum(column(metrics.train, key))) for key in curves.COUNTED}
    words = {"dropped": "micro-step{} dropped", "skipped": "update{} skipped"}
    said = [f"{count:,.0f} {words[key].format('s' * (count != 1))}" for key, count in counts.items() if count]
    body = f'<p class="note">In all, {" and ".join(said)}.</p>' if said else ""
    if metrics.events:
        rows = [
            [f"{line['update']:,.0f}", str(line.get("event", "")), str(line.get("text", ""))]
            for line in metrics.events
        ]
        table = _figures(["update", "event", "what happened"], rows, words=2)
        summary = f"<summary>All {len(rows):,} events</summary>"
        body = (f"<details>{summary}{table}</details>" if len(rows) > LONG else table) + body
    rows = [
        [f"{update:,.0f}", f"{before:,.0f} → {after:,.0f}", reason]
        for update, before, after, reason in curves.batch_changes(metrics)
    ]
    if rows:
        table = _figures(["update", "micro-steps", "why"], rows, words=1)
        body += f"<details><summary>Changes of the batch ({len(rows):,})</summary>{table}</details>"
    return _section("Events", body)


def _probes(probes: dict) -> str:
    """What the probes of long context show."""
    drawn = [charts.draw_chart(chart, [axis]) for chart, axis in probe_charts.curve_charts(probes)]
    drawn += probe_charts.grid_figures(probes)
    update = number(probes.get("update"))
    when = f'<p class="note">After update {update:,.0f}.</p>' if drawn and update is not None else ""
    newline = "\n"
    return _section(
        "Is the long context used?",
        f'<div class="grid">{newline}{newline.join(drawn)}{newline}</div>{when}' if drawn else "",
    )


def _figures(head: list[str], rows: list[list[str]], words: int = 0) -> str:
    """A table of numbers, of which the last `words` columns are text."""

    def cells(tag: str, texts: list[str]) -> str:
        at = len(texts) - words
        return "".join(
            f"<{tag}{' class=words' * (i >= at)}>{html.escape(text)}</{tag.split()[0]}>"
            for i, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "figures events" if words else "figures"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells("th scope=col", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


# --- samples ---


def _samples(run: Run) -> str:
    """The last round of samples, and a few of the earlier ones folded below it, the latest first."""
    if not run.samples:
        return ""
    heading, body = run.samples[-1]
    shown = (f"<h3>{html.escape(heading)}</h3>" if heading else "") + markdown.to_html(body)
    for heading, body in run.samples[-2 : -2 - EARLIER_SAMPLES : -1]:
        shown += f"<details><summary>{html.escape(heading)}</summary>{markdown.to_html(body)}</details>"
    return _section("Samples", f'<div class="samples">{shown}</div>')


# --- how to go on ---


def _commands(commands: dict[str, str]) -> str:
    items = "".join(
        f'<div class="command"><h3>{html.escape(label)}</h3>'
        f"<pre><code>{html.escape(command)}</code></pre></div>"
        for label, command in commands.items()
    )
    return _section("Commands", items)


def _configuration(config: dict) -> str:
    """The resolved configuration, folded, a table for each of its sections."""
    if not config:
        return ""
    alone = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {"": alone} | {key: value for key, value in config.items() if isinstance(value, dict)}
    tables = "".join(
        f"<div>{f'<h3>{html.escape(name)}</h3>' if name else ''}{_table(_flat(section))}</div>"
        for name, section in sections.items()
        if section
    )
    return _section(
        "Configuration", f'<details><summary>Every key</summary><div class="config">{tables}</div></details>'
    )


def _flat(section: dict, prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots, values as JSON, texts without their quotes unless empty."""
    flat: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (
                value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
            )
    return flat


# Each section of the page, in order, and the file that it shows.
SECTIONS: dict[Callable[[Run], str], str] = {
    _tiles: "summary.json",
    lambda run: _section("Plan", _table(_entries(run.summary.get("plan")))): "summary.json",
    _curves: "metrics.jsonl",
    lambda run: _events(run.metrics): "metrics.jsonl",
    lambda run: _probes(run.probes): "probes.json",
    _evaluations: "metrics.jsonl",
    _samples: "samples.md",
    lambda run: _commands(_entries(run.summary.get("commands"))): "summary.json",
    lambda run: _configuration(run.config): "config.json",
}
