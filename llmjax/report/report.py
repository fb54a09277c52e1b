"""Writes report.html: a run as one self-contained page that can be sent to a colleague as it is.

The page is made from the files of a workdir alone, so it can be written while a run is going, after it was killed, or
years later on a machine without jax. It loads nothing from elsewhere: style, script and curves are in the page, and a
content security policy forbids everything else. A browser without JavaScript shows all of it except the values under
the pointer and the buttons that copy commands.
"""

import html
import itertools
import pathlib
from collections.abc import Callable

from llmjax.files import write_atomically
from llmjax.quantities import format_duration, format_number
from llmjax.report import chart_axes, chart_drawing, charts, curves, probe_charts
from llmjax.report.page_parts import as_entries, entry_table, flatten, folded, section
from llmjax.report.record_tables import draw_classes, draw_evaluations, draw_events
from llmjax.report.results import draw_tiles
from llmjax.report.run_files import Run, read_run
from llmjax.scores import confusion
from llmjax.workdir import samples
from llmjax.workdir.metrics import number

# The content security policy: no source is allowed except the style and the script in the page itself.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# The rounds of samples in the page besides the newest. A choice: a long run samples hundreds of times.
EARLIER_SAMPLES = 10


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `workdir`/report.html from config.json, metrics.jsonl, summary.json, probes.json, classes.json and
    samples.jsonl.

    A file that does not exist has no section on the page. A file that cannot be read is named on the page. An older
    page is replaced in one step, so a reader never sees half a page. Returns the path of the page.
    """
    path = pathlib.Path(workdir) / "report.html"
    page = make_page(read_run(pathlib.Path(workdir)))
    write_atomically(path, page)
    return path


def make_page(run: Run) -> str:
    """The whole page as one string."""
    here = pathlib.Path(__file__)
    style, script = (here.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = _title(run)
    sections = [_draw(source, draw, run) for draw, source in SECTIONS.items()]
    subtitle = _draw("metrics.jsonl", _subtitle, run)
    # This comes after all sections, because sections add to the troubles while they are drawn.
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
    """The title in summary.json, or the name of the workdir if there is none."""
    title = run.summary.get("title")
    return title if isinstance(title, str) and title else run.name


def _draw(source: str, draw: Callable[[Run], str], run: Run) -> str:
    """`draw(run)`, or nothing if it fails because the file `source` holds values of unexpected kinds.

    A failure is added to the troubles of the run, which the page lists.
    """
    try:
        return draw(run)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        run.troubles.append(f"{source} holds values that cannot be shown ({type(error).__name__}).")
        return ""


def _subtitle(run: Run) -> str:
    """How far the run went, in updates, tokens and time: `40 of 80 updates · 655k tokens · 22 s`."""
    if not (run.metrics.train or run.metrics.evaluate or run.metrics.statistics):
        return "No updates yet."
    high = {axis.key: axis.high for axis in curves.positions(run.metrics).axes}
    config = run.config.get("train")
    planned = number(config.get("num_updates")) if isinstance(config, dict) else None
    of_planned = f" of {planned:,.0f}" if planned and planned > high["updates"] else ""
    plural = "s" * (high["updates"] != 1 or bool(of_planned))
    parts = [f"{high['updates']:,.0f}{of_planned} update{plural}"]
    if "tokens" in high:
        parts.append(f"{format_number(high['tokens'])} tokens")
    if "time" in high:
        parts.append(format_duration(high["time"]))
    return " · ".join(parts)


def _plan(run: Run) -> str:
    """What the planner said before the run: memory, time and the like."""
    return section("Plan", entry_table(as_entries(run.summary.get("plan"))))


def _curves(run: Run) -> str:
    """The charts of metrics.jsonl, below the switches that choose their axes."""
    loss = curves.loss_chart(run.metrics)
    known, others = curves.measure_charts(run.metrics)
    layers, more_layers = curves.layer_charts(run.metrics)
    if not (loss or known or others or layers or more_layers):
        return ""
    axes = curves.positions(run.metrics).axes
    grid = _grid(([loss] if loss else []) + known + layers, axes)
    # Charts that few readers need are folded.
    for title, more in (("layers", more_layers), ("measurements", others)):
        if more:
            grid += "\n" + folded(f"More {title} ({len(more)})", _grid(more, axes))
    # A reader must know that not every point is drawn.
    if max(len(run.metrics.train), len(run.metrics.evaluate)) > chart_drawing.POINTS_NARROW:
        grid += (
            f'<p class="note">Curves of more than {chart_drawing.POINTS_WIDE:,} points '
            f"({chart_drawing.POINTS_NARROW:,} in a narrow chart) are thinned to the lowest and "
            "the highest value among neighbours: no spike is lost.</p>"
        )
    names = {"updates": "Updates", "tokens": "Tokens", "time": "Time"}
    across = _switch("Horizontal axis", "x", [(axis.key, names[axis.key]) for axis in axes])
    up = _switch("Loss and gradient norm", "y", [("linear", "Linear"), ("log", "Log"), ("close", "Close-up")])
    return section("Curves", f'<form class="controls" autocomplete="off">{across}{up}</form>\n{grid}')


def _grid(drawn: list[charts.Chart], axes: list[chart_axes.Axis]) -> str:
    """Charts side by side, as many in a row as the screen has room for."""
    return (
        '<div class="grid">\n'
        + "\n".join(chart_drawing.draw_chart(chart, axes) for chart in drawn)
        + "\n</div>"
    )


def _switch(legend: str, name: str, choices: list[tuple[str, str]]) -> str:
    """A group of radio buttons for `choices` of (key, text). The first is checked.

    The style sheet shows the drawings that belong to the checked button, so that no script is needed.
    """
    buttons = "".join(
        f'<label><input type="radio" name="{name}" id="{name}-{key}"{" checked" * (i == 0)}>'
        f"<span>{text}</span></label>"
        for i, (key, text) in enumerate(choices)
    )
    return f"<fieldset><legend>{legend}</legend><div>{buttons}</div></fieldset>"


def _probes(run: Run) -> str:
    """The curves and grids of the probes of long context."""
    drawn = [chart_drawing.draw_chart(chart, [axis]) for chart, axis in probe_charts.curve_charts(run.probes)]
    drawn += probe_charts.grid_figures(run.probes)
    update = number(run.probes.get("update"))
    when = f'<p class="note">After update {update:,.0f}.</p>' if drawn and update is not None else ""
    newline = "\n"
    return section(
        "Is the long context used?",
        f'<div class="grid">{newline}{newline.join(drawn)}{newline}</div>{when}' if drawn else "",
    )


def _samples(run: Run) -> str:
    """The samples of the newest update, and below them a few earlier rounds, folded, the latest first."""
    rounds = [
        (f"update {update:,}", "".join(map(_sample, of_update)))
        for update, of_update in itertools.groupby(run.samples, lambda sample: sample.update)
    ]
    if not rounds:
        return ""
    heading, body = rounds[-1]
    shown = f"<h3>{heading}</h3>{body}"
    shown += "".join(folded(*earlier) for earlier in rounds[-2 : -2 - EARLIER_SAMPLES : -1])
    return section("Samples", f'<div class="samples">{shown}</div>')


def _sample(sample: samples.Sample) -> str:
    """The prompt and the continuation. `dir="auto"` lets the browser find out which way the text runs."""
    parts = {"prompt": sample.prompt, "continuation": sample.text}
    return "".join(
        f'<h4>{name}</h4><pre dir="auto">{html.escape(text)}</pre>' for name, text in parts.items()
    )


def _commands(run: Run) -> str:
    """The shell commands with which to go on from the run, for example to generate text."""
    items = "".join(
        f'<div class="command"><h3>{html.escape(label)}</h3>'
        f"<pre><code>{html.escape(command)}</code></pre></div>"
        for label, command in as_entries(run.summary.get("commands")).items()
    )
    return section("Commands", items)


def _configuration(run: Run) -> str:
    """The resolved configuration as a table for each of its sections, folded."""
    if not run.config:
        return ""
    # Keys outside of all sections make a first table without a heading.
    alone = {key: value for key, value in run.config.items() if not isinstance(value, dict)}
    tables_of = {"": alone} | {key: value for key, value in run.config.items() if isinstance(value, dict)}
    tables = "".join(
        f"<div>{f'<h3>{html.escape(name)}</h3>' if name else ''}{entry_table(flatten(values))}</div>"
        for name, values in tables_of.items()
        if values
    )
    return section("Configuration", folded("Every key", f'<div class="config">{tables}</div>'))


# The sections of the page, in order, each with the file that it shows.
SECTIONS: dict[Callable[[Run], str], str] = {
    draw_tiles: "summary.json",
    _plan: "summary.json",
    _curves: "metrics.jsonl",
    lambda run: draw_events(run.metrics): "metrics.jsonl",
    _probes: "probes.json",
    draw_classes: confusion.FILE,
    draw_evaluations: "metrics.jsonl",
    _samples: samples.FILE,
    _commands: "summary.json",
    _configuration: "config.json",
}
