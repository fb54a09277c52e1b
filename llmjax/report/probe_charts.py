"""Makes pictures of probes.json, the results of the probes of long context.

There are curves over a logarithmic axis of lengths, and grids that show how often something hidden at some depth of a
text of some length was found. Values that are not written as the probes write them are left out.
"""

import html
import math

import numpy as np

from llmjax.quantities import format_number
from llmjax.report import chart_axes, charts
from llmjax.workdir.metrics import number

# The names of the languages of probes, and of the probes that are drawn as grids.
LANGUAGES = {"en": "English", "zh": "Chinese"}
GRIDS = {"passkey": "Pass key", "needle": "Needle"}
# The most lengths for which a grid of half the page's width has room.
NARROW = 7

# A chart, and the horizontal axis that it has for itself.
ChartAndAxis = tuple[charts.Chart, chart_axes.Axis]


def curve_charts(probes: dict) -> list[ChartAndAxis]:
    """The charts of loss by position, loss by context, and accuracy of copying by distance, if they were measured."""
    return [drawn for name, make in CURVES.items() if (drawn := make(probes.get(name)))]


def _position(result: object) -> ChartAndAxis | None:
    """The loss of targets by their position in the document."""
    note = "Every held-out target, by the number of tokens before it in its document, in buckets that double."
    axis = "position", "tokens before, from"
    return _over_log2(
        result, "from", "loss", axis, "Loss by position", "nats per token", "heldout", note=note
    )


def _context(result: object) -> ChartAndAxis | None:
    """The loss of the same targets by the number of tokens that the model sees before them."""
    targets, documents = (
        number(result.get(key)) if isinstance(result, dict) else None for key in ("targets", "documents")
    )
    which = "targets"
    if targets is not None and documents is not None:
        which = f"{targets:,.0f} targets of {documents:,.0f} documents"
    note = f"The same {which} at every length, each predicted from that many tokens before it at most."
    axis = "context", "tokens of context"
    return _over_log2(
        result, "length", "loss", axis, "Loss by context", "nats per token", "heldout", note=note
    )


def _copy(result: object) -> ChartAndAxis | None:
    """How often random tokens are predicted when they come a second time, by the distance from the first time."""
    chance = number(result.get("chance")) if isinstance(result, dict) else None
    note = "How many tokens are known when random ones come again."
    note += f" Guessing: {format_number(100 * chance, 2)}%." if chance is not None else ""
    axis = "distance", "tokens since the first copy"
    return _over_log2(
        result,
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
    result: object,
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
) -> ChartAndAxis | None:
    """A chart of one curve over a logarithmic axis, or None if `result` does not hold it.

    Args:
      result: a probe's result, which should be a dict of lists.
      x: the key of the list of positions. A 0 is drawn at 1/2, so that the starts 0, 1, 2, 4, ... of buckets that
        double lie at equal distances.
      y: the key of the list of values.
      axis: the key and the label of the horizontal axis.
      title: the heading of the chart.
      unit: the unit of the values after they are multiplied by `scale`.
      style: the style of the curve, see `charts.Curve`.
      scale: a factor for the values.
      note: a sentence below the chart.
      floor, ceiling, suffix: see `charts.Chart`.
    """
    # Everything is checked, because somebody may have edited the file, or an older version may have written it.
    lists = [result.get(key) if isinstance(result, dict) else None for key in (x, y)]
    if not all(isinstance(each, list) for each in lists):
        return None
    pairs = ((number(a), number(b)) for a, b in zip(*lists))
    known = ((a, b) for a, b in pairs if a is not None and b is not None)
    # A negative length has no place on a logarithmic axis.
    points = sorted((a, b) for a, b in known if a >= 0 and math.isfinite(a + b))
    if not points:
        return None
    at = np.log2([a or 0.5 for a, _ in points])
    # An axis begins at 0.
    at -= at[0]
    values = scale * np.array([b for _, b in points])
    marks = tuple((float(where), f"{a:,.0f}") for where, (a, _) in zip(at, points))
    key, label = axis
    name = "held-out" if style == "heldout" else title
    curve = charts.Curve(name, style, {key: at}, values, markers=True)
    chart = charts.Chart(title, unit, (curve,), floor=floor, ceiling=ceiling, suffix=suffix, note=note)
    return chart, chart_axes.Axis(key, label, marks[-1][0], marks=marks)


# The probes that are drawn as curves, by their keys in probes.json.
CURVES = {"position": _position, "context": _context, "copy": _copy}


def grid_figures(probes: dict) -> list[str]:
    """A table as HTML for each probe in `GRIDS` and each language: a row for each depth, a column for each length.

    The colour of a cell shows how often the hidden text was found.
    """
    return [
        figure
        for name, title in GRIDS.items()
        for result in (probes[name] if isinstance(probes.get(name), list) else [])
        if (figure := _grid_figure(title, result))
    ]


def _grid_figure(title: str, result: object) -> str:
    """One table, or nothing if `result` does not hold a complete one."""
    if not isinstance(result, dict):
        return ""
    lengths, depths = _numbers(result.get("length")), _numbers(result.get("depth"))
    chance = number(result.get("chance"))
    # Shares from 0 to 1: how often the hidden answer was the likeliest of several, and how often it was generated.
    choice, exact = (_rows(result.get(key), len(depths), len(lengths)) for key in ("choice", "exact"))
    if not (lengths and depths and choice and exact) or chance is None:
        return ""
    language = LANGUAGES.get(str(result.get("language")), "")
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
    # The style sheet needs the number of columns for the least width of the table.
    wide, columns = " wide" * (len(lengths) > NARROW), f'style="--columns:{len(lengths)}"'
    return (
        f'<figure class="chart{wide}"><figcaption><h3>{html.escape(title)}</h3><span class="unit">{language}</span>'
        f'</figcaption><div class="scroll"><table class="heat" {columns}><thead><tr><th>depth</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{note}</p></figure>'
    )


def _cell(choice: float, exact: float, chance: float) -> str:
    """A cell with both shares in per cent, coloured by `choice`: from none at the share of a guess to full at 100%."""
    heat = min(max((choice - chance) / (1 - chance), 0.0), 1.0) if chance < 1 else 0.0
    return (
        f'<td style="--heat:{100 * heat:.0f}%"><b>{100 * choice:.0f}</b><small>{100 * exact:.0f}</small></td>'
    )


def _numbers(value: object) -> list[float]:
    """The numbers of a list, or an empty list if it holds anything but finite numbers."""
    numbers = [number(each) for each in value] if isinstance(value, list) else []
    known = [n for n in numbers if n is not None and math.isfinite(n)]
    return known if len(known) == len(numbers) else []


def _rows(value: object, height: int, width: int) -> list[list[float]]:
    """The rows of a grid of `height` rows of `width` numbers, or an empty list if it is not one."""
    rows = [_numbers(row) for row in value] if isinstance(value, list) else []
    return rows if len(rows) == height and all(len(row) == width for row in rows) else []
