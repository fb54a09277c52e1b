"""What charts are drawn with: curves thinned and smoothed, ranges and ticks of axes.

Long curves are thinned to the lowest and the highest value of every bucket of neighbours. A bucket mean would
be shorter, but it hides exactly the spikes for which one looks at a loss curve.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from llmjax.quantities import format_number


@dataclasses.dataclass(frozen=True)
class Axis:
    """A horizontal axis from 0 to `high` (in the units of the records), labelled in units of `divisor`."""

    key: str  # updates, tokens or time, between which the page switches, or what else is the chart's own
    label: str
    high: float
    divisor: float = 1.0
    whole: bool = False  # ticks at whole numbers only
    marks: tuple[tuple[float, str], ...] = ()  # every point there is and its text, in the place of numbers


# --- points ---


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most `limit` values, with the first, the last, and every bucket's lowest and highest.

    A bucket without a finite value keeps one index, so that the line is broken there.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    keep = {0, len(values) - 1}
    edges = np.linspace(1, len(values) - 1, (limit - 2) // 2 + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        bucket = values[start:stop]
        finite = np.flatnonzero(np.isfinite(bucket))
        if finite.size:
            keep |= {
                int(start + finite[np.argmin(bucket[finite])]),
                int(start + finite[np.argmax(bucket[finite])]),
            }
        else:
            keep.add(int(start))
    return np.array(sorted(keep))


def smooth(values: np.ndarray, half_width: int) -> np.ndarray:
    """Centred moving mean over 2 x `half_width` + 1 values; what is not finite is left out and stays a gap.

    The window narrows towards the start, where a loss falls too fast to be averaged, and ends with the curve.
    """
    index = np.arange(len(values))
    half = np.minimum(half_width, index // 2)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan)


# --- axes ---


def make_time_axis(seconds: float) -> Axis:
    """The time axis in the unit that keeps its numbers small."""
    for limit, divisor, label in ((120, 1, "seconds"), (7200, 60, "minutes"), (172800, 3600, "hours")):
        if seconds <= limit:
            return Axis("time", label, seconds, divisor)
    return Axis("time", "days", seconds, 86400)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten in [low, high], about `count` of them at most."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    steps = [m * power for m in (1, 2, 2.5, 5, 10)]
    if whole:
        steps = [s for s in steps if s >= 1 and s == int(s)] or [1.0]
    step = next((s for s in steps if (high - low) / s <= count), steps[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def apart(marks: Sequence[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """The first of the marks, and every further one that is at least so far from the one kept before it."""
    kept: list[tuple[float, str]] = []
    for mark in marks:
        if not kept or mark[0] - kept[-1][0] >= least:
            kept.append(mark)
    return kept


def tick_labels(marks: list[float]) -> list[str]:
    """The marks as text, with as many decimals in each as the finest needs where they are evenly spaced."""
    labels = [format_number(mark, 4) for mark in marks]
    even = len(marks) < 3 or math.isclose(marks[1] - marks[0], marks[-1] - marks[-2], rel_tol=1e-6)
    if not even or any(label[-1] in "kMBT" or "×" in label for label in labels):
        return labels
    decimals = max(len(label.partition(".")[2]) for label in labels)
    return [f"{mark:.{decimals}f}".replace("-", "−") if mark else "0" for mark in marks]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis: even steps in a short range, round numbers in a long one."""
    decades = math.log10(high / low)
    if decades < 0.5:
        return ticks(low, high, 6)
    stride = math.ceil(decades / 6)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 3, 5) if decades < 1.2 else (1, 2, 5) if decades < 2.5 else (1,)
    marks = [float(f"{m}e{e}") for e in exponents if e % stride == 0 for m in factors]
    return [mark for mark in marks if low <= mark <= high]


def domain(
    values: np.ndarray, floor: float | None, ceiling: float | None, clip: bool = False
) -> tuple[float, float]:
    """The range of a linear axis over finite `values`, with a little air where no floor or ceiling is given.

    With `clip`, a largest value more than four times the 99th percentile is left above the axis.
    """
    low, high = float(np.min(values)), float(np.max(values))
    if clip and len(values) >= 20 and high > 4 * (bulk := float(np.quantile(values, 0.99))) > 0:
        high = 1.25 * bulk
    low, high = (low if floor is None else min(low, floor)), (high if ceiling is None else max(high, ceiling))
    if low == high:
        air = abs(low) / 10 or 1.0
        return low - (0 if low == floor else air), high + (0 if high == ceiling else air)
    air = 0.06 * (high - low)
    return low - (0 if low == floor else air), high + (0 if high == ceiling else air)
