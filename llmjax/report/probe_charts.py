"""From probes.json to the pictures of a report: curves over lengths, drawn to log2, and grids of depth by length.

What is not as the probes write it is left out, like everything that a report cannot read.
"""

import html
import math

import numpy as np

from llmjax.quantities import format_number
from llmjax.report import chart_axes, charts
from llmjax.workdir.metrics import number

LANGUAGES = {"en": "English", "zh": "Chinese"}
GRIDS = {"passkey": "Pass key", "needle": "Needle"}
NARROW = 7  # lengths that a grid of half the page's width has room for


Drawn = tuple[charts.Chart, chart_axes.Axis]


def curve_charts(probes: dict) -> list[Drawn]:
    """Loss by position and by context, and accuracy of copying by distance, of those that were measured."""
    return [drawn for name, make in CURVES.items() if (drawn := make(probes.get(name)))]


def _position(of: object) -> Drawn | None:
    note = "Every held-out target, by the number of tokens before it in its document, in buckets that double."
    axis = "position", "tokens before, from"
    return _over_log2(of, "from", "loss", axis, "Loss by position", "nats per token", "heldout", note=note)


def _context(of: object) -> Drawn | None:
    targets, documents = (
        number(of.get(key)) if isinstance(of, dict) else None for key in ("targets", "documents")
    )
    which = "targets"
    if targets is not None and documents is not None:
        which = f"{targets:,.0f} targets of {documents:,.0f} documents"
    note = f"The same {which} at every length, each predicted from that many tokens before it at most."
    axis = "context", "tokens of context"
    return _over_log2(of, "length", "loss", axis, "Loss by context", "nats per token", "heldout", note=note)


def _copy(of: object) -> Drawn | None:
    chance = number(of.get("chance")) if isinstance(of, dict) else None
    note = "How many tokens are known when random ones come again."
    note += f" Guessing: {format_number(100 * chance, 2)}%." if chance is not None else ""
    axis = "distance", "tokens since the first copy"
    return _over_log2(
        of,
        "distance",
        "accuracy",
        axis,
        "Copying",
        "of random tokens",
        "train",
        100,
        note=note,
        floor=0,
        ceiling=100,
        suffix="%",
    )


def _over_log2(
    of: object,
    x: str,
    y: str,
    axis: tuple[str, str],
    title: str,
    unit: str,
    style: str,
    scale: float = 1.0,
    *,
    note: str,
    floor: float | None = None,
    ceiling: float | None = None,
    suffix: str = "",
) -> Drawn | None:
    """The list under `y`, times `scale`, over log2 of the list under `x`; None where there is none.

    0 has the place of 1/2: buckets [0, 1), [1, 2), [2, 4), ... are evenly spaced.
    """
    lists = [of.get(key) if isinstance(of, dict) else None for key in (x, y)]
    if not all(isinstance(each, list) for each in lists):
        return None
    pairs = ((number(a), number(b)) for a, b in zip(*lists))
    known = ((a, b) for a, b in pairs if a is not None and b is not None)
    points = sorted((a, b) for a, b in known if a >= 0 and math.isfinite(a + b))
    if not points:
        return None
    at = np.log2([a or 0.5 for a, _ in points])
    at -= at[0]
    values = scale * np.array([b for _, b in points])
    marks = tuple((float(where), f"{a:,.0f}") for where, (a, _) in zip(at, points))
    key, label = axis
    name = "held-out" if style == "heldout" else title
    curve = charts.Curve(name, style, {key: at}, values, markers=True)
    chart = charts.Chart(title, unit, (curve,), floor=floor, ceiling=ceiling, suffix=suffix, note=note)
    return chart, chart_axes.Axis(key, label, marks[-1][0], marks=marks)


CURVES = {"position": _position, "context": _context, "copy": _copy}


def grid_figures(probes: dict) -> list[str]:
    """A table for each probe and language: rows of depths, columns of lengths, coloured by how often it was found."""
    return [
        figure
        for name, title in GRIDS.items()
        for of in (probes[name] if isinstance(probes.get(name), list) else [])
        if (figure := _grid_figure(title, of))
    ]


def _grid_figure(title: str, of: object) -> str:
    if not isinstance(of, dict):
        return ""
    lengths, depths, chance = _numbers(of.get("length")), _numbers(of.get("depth")), number(of.get("chance"))
    choice, exact = (_rows(of.get(key), len(depths), len(lengths)) for key in ("choice", "exact"))
    if not (lengths and depths and choice and exact) or chance is None:
        return ""
    language = LANGUAGES.get(str(of.get("language")), "")
    head = "".join(f"<th scope=col>{n:,.0f}</th>" for n in lengths)
    body = "".join(
        f"<tr><th scope=row>{100 * depth:.0f}%</th>"
        f"{''.join(_cell(*found, chance) for found in zip(choices, exacts))}</tr>"
        for depth, choices, exacts in zip(depths, choice, exact)
    )
    note = (
        f"Per cent in which the hidden answer was likelier than the others (guessing: {100 * chance:.0f}); small: in "
        "which greedy decoding gives it."
    )
    wide, columns = " wide" * (len(lengths) > NARROW), f'style="--columns:{len(lengths)}"'
    return (
        f'<figure class="chart{wide}"><figcaption><h3>{html.escape(title)}</h3><span class="unit">{language}</span>'
        f'</figcaption><div class="scroll"><table class="heat" {columns}><thead><tr><th>depth</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{note}</p></figure>'
    )


def _cell(choice: float, exact: float, chance: float) -> str:
    """A field whose colour goes from guessing to finding always."""
    heat = min(max((choice - chance) / (1 - chance), 0.0), 1.0) if chance < 1 else 0.0
    return (
        f'<td style="--heat:{100 * heat:.0f}%"><b>{100 * choice:.0f}</b><small>{100 * exact:.0f}</small></td>'
    )


def _numbers(value: object) -> list[float]:
    """The numbers of a list; none where it holds anything else."""
    numbers = [number(each) for each in value] if isinstance(value, list) else []
    known = [n for n in numbers if n is not None and math.isfinite(n)]
    return known if len(known) == len(numbers) else []


def _rows(value: object, height: int, width: int) -> list[list[float]]:
    """The rows of a grid of this size; none where it is another or holds anything but numbers."""
    rows = [_numbers(row) for row in value] if isinstance(value, list) else []
    return rows if len(rows) == height and all(len(row) == width for row in rows) else []
