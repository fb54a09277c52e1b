"""What a chart of the report consists of: curves, marks of events, and the properties of its vertical axis.

`curves.py` and `probe_charts.py` make charts from the files of a run, and `chart_drawing.py` draws them.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart.

    name     what the legend calls it
    style    a CSS class of the style sheet: raw, train, heldout, depth or other
    x        float [points] for each key of a horizontal axis: where the points lie on that axis
    values   float [points], the heights of the points. The line has a gap where a value is not finite
    markers  whether every point has a dot
    depth    for the style `depth`: where a layer lies between the first (0) and the last (1), which decides its colour
    keyed    whether the legend shows the name and the last value
    """

    name: str
    style: str
    x: dict[str, np.ndarray]
    values: np.ndarray
    markers: bool = False
    depth: float = 0.0
    keyed: bool = True


@dataclasses.dataclass(frozen=True)
class Mark:
    """An event of the run, drawn as a flag.

    name  what happened
    x     its position on each horizontal axis, by the key of the axis
    """

    name: str
    x: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves that share one vertical axis.

    title    the heading
    unit     the unit of all values, shown beside the heading
    curves   the lines, drawn one over the other in this order
    wide     whether the chart is as wide as the page, and not half as wide
    floor    the vertical axis reaches down to this value at least, and stops there if no value is smaller
    ceiling  the vertical axis reaches up to this value at least, and stops there if no value is larger
    scales   whether the reader can also choose a logarithmic axis, if all values are positive, and a close-up of the
             later part of the run
    whole    whether ticks stand at whole numbers only, as for counts
    clip     whether a few values far above all others may lie outside of the axis. A note below the chart names them
    tall     whether the chart is higher than usual, as charts of many curves are
    log      whether the only vertical axis is logarithmic. Values that are not above 0 are left out, and a note says so
    suffix   follows every number, as in 98.7%
    marks    events to flag
    note     a sentence below the chart
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    wide: bool = False
    floor: float | None = None
    ceiling: float | None = None
    scales: bool = False
    whole: bool = False
    clip: bool = False
    tall: bool = False
    log: bool = False
    suffix: str = ""
    marks: tuple[Mark, ...] = ()
    note: str = ""
