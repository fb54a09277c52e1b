"""Writes report.html: a run as one self-contained page that can be sent to a colleague as it is.

The page is made from the files of a workdir alone, so it can be written while a run is going, after it was
killed, or years later on a machine without jax. It loads nothing: style, script and curves are inside, and a
content security policy forbids the rest. Without JavaScript only the read-out under the pointer is lost.
"""

import dataclasses
import html
import json
import os
import pathlib
import re

import numpy as np

from llmjax.train import charts, curves

CANONICAL = ("loss", "perplexity", "bits per byte")  # results that the last evaluation gives more exactly
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
EARLIER_SAMPLES = 10  # this many earlier rounds of samples stay in the page, folded


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir says about its run; all of it may be missing."""

    name: str
    config: dict
    metrics: curves.Metrics
    summary: dict
    samples: list[tuple[str, str]]  # heading and body of each round
    troubles: list[str]  # files that are there but cannot be read


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `workdir`/report.html from config.json, metrics.jsonl, summary.json and samples.md.

    Files that do not exist leave their section out; files that cannot be read are named on the page. The page
    replaces an older one in one step, so a reader never sees half of it.
    """
    path = pathlib.Path(workdir) / "report.html"
    page = make_page(read_run(pathlib.Path(workdir)))
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read_run(workdir: pathlib.Path) -> Run:
    """Reads what there is of a run."""
    troubles: list[str] = []
    metrics = curves.read_metrics(workdir / "metrics.jsonl")
    if metrics.unreadable:
        troubles.append(f"metrics.jsonl: {metrics.unreadable:,} unreadable lines were left out.")
    config, summary = (_read_dict(workdir / name, troubles) for name in ("config.json", "summary.json"))
    samples = workdir / "samples.md"
    text = samples.read_text(encoding="utf-8", errors="replace") if samples.exists() else ""
    return Run(workdir.resolve().name, config, metrics, summary, split_samples(text), troubles)


def _read_dict(path: pathlib.Path, troubles: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
    title = str(run.summary.get("title") or run.name)
    sections = [
        _tiles(run),
        _section("Plan", _table(_entries(run.summary.get("plan")))),
        _curves(run),
        _evaluations(run),
        _samples(run),
        _commands(_entries(run.summary.get("commands"))),
        _configuration(run.config),
    ]
    troubles = "".join(f'<p class="trouble">{html.escape(trouble)}</p>' for trouble in run.troubles)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(_subtitle(run))}</p>{troubles}</header>\n"
        + "\n".join(filter(None, sections))
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


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
    lines = run.metrics.train or run.metrics.evaluate
    if not lines:
        return "No updates yet."
    _, _, axes = curves.positions(run.metrics)
    high = {axis.key: axis.high for axis in axes}
    section = run.config.get("train")
    planned = curves.number(section.get("num_updates")) if isinstance(section, dict) else None
    of = f" of {planned:,.0f}" if planned and planned > high["updates"] else ""
    parts = [f"{high['updates']:,.0f}{of} update{'s' * (high['updates'] != 1 or bool(of))}"]
    if "tokens" in high:
        parts.append(f"{charts.format_number(high['tokens'])} tokens")
    if "time" in high:
        parts.append(charts.format_duration(high["time"]))
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
        covered = run.metrics.evaluate and any(label.lower().endswith(name) for name in CANONICAL)
        if not covered and (label not in compressors or not run.metrics.evaluate):
            tiles.append((label, text, ""))
    speed = curves.column(run.metrics.train, "tokens_per_second")
    speed = speed[np.isfinite(speed)]
    if speed.size:
        mfu = curves.column(run.metrics.train, "mfu")
        mfu = mfu[np.isfinite(mfu)]
        note = f"median, {100 * np.median(mfu):.1f}% of peak" if mfu.size else "median"
        tiles.append(("Tokens per second", charts.format_number(float(np.median(speed))), note))
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
    if evaluate and evaluate[-1].get("loss") is not None:
        loss = curves.column(evaluate, "loss")
        finite = np.flatnonzero(np.isfinite(loss))
        lowest = int(finite[np.argmin(loss[finite])]) if finite.size else len(loss) - 1
        note = f"lowest {loss[lowest]:.3f} at update {evaluate[lowest]['update']:,.0f}"
        tiles.append(
            ("Held-out loss", f"{loss[-1]:.3f}", "nats per token" if lowest == len(loss) - 1 else note)
        )
        beside = " · ".join(
            f"{re.sub(r'[,:]? *bits per byte', '', label, flags=re.IGNORECASE)} {text}"
            for label, text in compressors.items()
        )
        for key, label, note in (
            ("perplexity", "Perplexity", "per token"),
            ("bits_per_byte", "Bits per byte", beside or "of held-out text"),
        ):
            if evaluate[-1].get(key) is not None:
                value = evaluate[-1][key]
                text = f"{value:.3f}" if key == "bits_per_byte" else charts.format_number(value, 4)
                tiles.append((label, text, note))
    elif run.metrics.train:
        loss = curves.column(run.metrics.train, "loss")
        if np.isfinite(loss).any():
            tiles.append(("Train loss", f"{loss[np.isfinite(loss)][-1]:.3f}", "nats per token, last update"))
    return tiles


# --- curves ---


def _curves(run: Run) -> str:
    """All charts under the one choice of axes."""
    loss = curves.loss_chart(run.metrics)
    known, others = curves.measure_charts(run.metrics)
    if not (loss or known or others):
        return ""
    _, _, axes = curves.positions(run.metrics)
    drawn = [charts.draw_chart(chart, axes) for chart in ([loss] if loss else []) + known]
    grid = f'<div class="grid">\n{chr(10).join(drawn)}\n</div>'
    more = "\n".join(charts.draw_chart(chart, axes) for chart in others)
    if more:
        summary = f"<summary>More measurements ({len(others)})</summary>"
        grid += f'\n<details>{summary}<div class="grid">\n{more}\n</div></details>'
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
    first = [
        key
        for key in ("update", "tokens", "loss", "perplexity", "bits_per_byte")
        if any(key in x for x in lines)
    ]
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
        return f"{value:.4f}" if key in ("loss", "bits_per_byte") else charts.format_number(value, 4)

    head = "".join(f'<th scope="col">{html.escape(key.replace("_", " "))}</th>' for key in keys)
    rows = "".join(
        "<tr>" + "".join(f"<td>{cell(key, line.get(key))}</td>" for key in keys) + "</tr>" for line in lines
    )
    table = f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    table = f'<div class="scroll">{table}</div>'
    if len(lines) > 12:
        table = f"<details><summary>All {len(lines):,} evaluations</summary>{table}</details>"
    return _section("Held-out evaluations", table)


# --- samples ---


def split_samples(text: str) -> list[tuple[str, str]]:
    """(heading, body) of each `##` section of a Markdown text; headings inside fenced code do not count."""
    rounds: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in text.splitlines():
        fence = _fence_after(line, fence)
        if not fence and line.startswith("## "):
            rounds.append((line[3:].strip(), []))
        else:
            rounds[-1][1].append(line)
    split = [(heading, "\n".join(lines)) for heading, lines in rounds]
    headed = [part for part in split if part[0]]
    return headed or [part for part in split if part[1].strip()]


def _fence_after(line: str, fence: str) -> str:
    """The fence that is open after this line ("" for none); one closes at its own sign, as long or longer."""
    match = re.match(r" {0,3}(`{3,}|~{3,})(.*)$", line)
    if not match:
        return fence
    if not fence:
        return match[1]
    closes = match[1][0] == fence[0] and len(match[1]) >= len(fence) and not match[2].strip()
    return "" if closes else fence


def _markdown(text: str) -> str:
    """Headings, paragraphs and fenced code as HTML; all else stays as it is written, escaped."""
    parts, block, fence = [], [], ""

    def close(tag: str) -> None:
        content = html.escape("\n".join(block))
        if tag == "pre" or content.strip():
            parts.append(f'<{tag} dir="auto">{content}</{tag}>')
        block.clear()

    for line in text.splitlines():
        before, fence = fence, _fence_after(line, fence)
        if fence and not before:
            close("p")
        elif before and not fence:
            close("pre")
        elif not fence and (heading := re.match(r"(#{1,6}) +(.*)$", line)):
            close("p")
            parts.append("<h4>" + re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(heading[2])) + "</h4>")
        elif not fence and not line.strip():
            close("p")
        else:
            block.append(line)
    close("pre" if fence else "p")
    return "".join(parts)


def _samples(run: Run) -> str:
    """The last round of samples, and a few of the earlier ones folded below it, the latest first."""
    if not run.samples:
        return ""
    heading, body = run.samples[-1]
    shown = (f"<h3>{html.escape(heading)}</h3>" if heading else "") + _markdown(body)
    for heading, body in run.samples[-2 : -2 - EARLIER_SAMPLES : -1]:
        shown += f"<details><summary>{html.escape(heading)}</summary>{_markdown(body)}</details>"
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
