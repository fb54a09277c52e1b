"""The arithmetic of charts: thins and smooths curves, and chooses the ranges and ticks of axes.

Long curves are thinned to the lowest and the highest value of every bucket of neighbouring points. The mean of a bucket
would take half as many points, but it would hide the spikes for which one looks at a loss curve.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from llmjax.quantities import format_number

# The most that the time axis may span, in seconds, in units of this many seconds with this name. The first entry that
# fits is used, and days beyond the last. A choice: the numbers on the axis stay below about 120.
TIME_UNITS = ((120, 1, "seconds"), (7200, 60, "minutes"), (172800, 3600, "hours"))
SECONDS_PER_DAY = 86400
# A choice: an axis may leave out values only if the largest is more than CLIP_FACTOR times this quantile. It then ends
# at CLIP_END times the quantile. With fewer than CLIP_LEAST_VALUES values such a quantile would mean little.
CLIP_QUANTILE = 0.99
CLIP_FACTOR = 4
CLIP_END = 1.25
CLIP_LEAST_VALUES = 20
# The part of a linear axis that stays free beyond the lowest and the highest value. A choice.
MARGIN = 0.06


@dataclasses.dataclass(frozen=True)
class Axis:
    """A horizontal axis from 0 to `high`.

    key      `updates`, `tokens` or `time`, between which the page can switch, or the key of a chart's own axis
    label    the text below the axis
    high     the right end, in the units of the records: updates, tokens or seconds
    divisor  the labels show positions divided by this, for example 3600 to show hours
    whole    whether ticks stand at whole numbers only
    marks    (position, text) of every point on the axis. If there are any, they take the place of round numbers
    """

    key: str
    label: str
    high: float
    divisor: float = 1.0
    whole: bool = False
    marks: tuple[tuple[float, str], ...] = ()


# --- points ---


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Chooses at most `limit` of the values, float [points], and returns their indices, int [kept], ascending.

    The first and the last value are kept, and the lowest and the highest of each bucket of neighbours. A bucket without
    a finite value keeps one index, so that the line has a gap there.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    # Two indices for each bucket, and the two ends.
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
    """The centred moving mean over 2 x `half_width` + 1 of the values, float [points]: float [points].

    Values that are not finite do not count in any mean, and they stay gaps. Near the start the window narrows on both
    sides, because a loss falls too fast there to be averaged. Near the end the window stops at the last value.
    """
    index = np.arange(len(values))
    # A window [low, high) around each point that reaches at most halfway back to the start.
    half = np.minimum(half_width, index // 2)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    finite = np.isfinite(values)
    # The sum over a window is a difference of two cumulative sums.
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan)


# --- axes ---


def make_time_axis(seconds: float) -> Axis:
    """The time axis of a run of this many seconds, labelled in seconds, minutes, hours or days."""
    for limit, divisor, label in TIME_UNITS:
        if seconds <= limit:
            return Axis("time", label, seconds, divisor)
    return Axis("time", "days", seconds, SECONDS_PER_DAY)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """The ticks of a linear axis: multiples of 1, 2, 2.5 or 5 times a power of ten in [low, high].

    There are about `count` of them at most, and only whole numbers if `whole`.
    """
    if not high > low:
        return [low]
    # The candidates lie between the power of ten below the ideal distance of ticks and the one above it.
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    steps = [m * power for m in (1, 2, 2.5, 5, 10)]
    if whole:
        steps = [s for s in steps if s >= 1 and s == int(s)] or [1.0]
    step = next((s for s in steps if (high - low) / s <= count), steps[-1])
    # The small number lets an end that is a tick count as one in spite of rounding.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def apart(marks: Sequence[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """The first of the (position, text) marks, and each further one at a distance of `least` or more from the last kept
    one."""
    kept: list[tuple[float, str]] = []
    for mark in marks:
        if not kept or mark[0] - kept[-1][0] >= least:
            kept.append(mark)
    return kept


def tick_labels(marks: list[float]) -> list[str]:
    """The ticks as text. Evenly spaced ones all get as many decimals as the one that needs most: 0.5, 1.0, 1.5."""
    labels = [format_number(mark, 4) for mark in marks]
    # Ticks of a logarithmic axis are uneven, and large or tiny numbers have suffixes or exponents.
    even = len(marks) < 3 or math.isclose(marks[1] - marks[0], marks[-1] - marks[-2], rel_tol=1e-6)
    if not even or any(label[-1] in "kMBT" or "×" in label for label in labels):
        return labels
    decimals = max(len(label.partition(".")[2]) for label in labels)
    return [f"{mark:.{decimals}f}".replace("-", "−") if mark else "0" for mark in marks]


def log_ticks(low: float, high: float) -> list[float]:
    """The ticks of a logarithmic axis from `low` to `high`, both positive.

    If the axis spans a factor of about 3 or less, ticks have equal distances as on a linear axis. Otherwise they are
    1, 2, 3 or 5 times powers of ten, and fewer of these the more powers of ten there are.
    """
    decades = math.log10(high / low)
    if decades < 0.5:
        return ticks(low, high, 6)
    # Only every `stride`-th power of ten, so that there are about six at most.
    stride = math.ceil(decades / 6)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 3, 5) if decades < 1.2 else (1, 2, 5) if decades < 2.5 else (1,)
    marks = [float(f"{m}e{e}") for e in exponents if e % stride == 0 for m in factors]
    return [mark for mark in marks if low <= mark <= high]


def domain(
    values: np.ndarray, floor: float | None, ceiling: float | None, clip: bool = False
) -> tuple[float, float]:
    """The lower and the upper end of a linear axis over finite `values`.

    floor    the axis begins at this value, or below it if a value is smaller; None to begin a little below the values
    ceiling  the axis ends at this value, or above it if a value is larger; None to end a little above the values
    clip     whether the largest values may lie outside if they are far above all others, see `CLIP_FACTOR`
    """
    low, high = float(np.min(values)), float(np.max(values))
    if clip and len(values) >= CLIP_LEAST_VALUES:
        bulk = float(np.quantile(values, CLIP_QUANTILE))
        if high > CLIP_FACTOR * bulk > 0:
            high = CLIP_END * bulk
    low, high = (low if floor is None else min(low, floor)), (high if ceiling is None else max(high, ceiling))
    # Equal values still need an axis of some length.
    margin = MARGIN * (high - low) if low != high else abs(low) / 10 or 1.0
    return low - (0 if low == floor else margin), high + (0 if high == ceiling else margin)
