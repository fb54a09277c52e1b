"""How long a ring takes: work [n, n], of the queries of each device against the keys of each device, as time.

Keys travel from device to device in both directions at once: at step 0 a device attends to its own keys, at step s to
those of the devices s before it and s after it. For an even n these are the same device at the last step, n / 2, and
its keys come in one direction only. Steps beyond the furthest keys that any device needs are left out, in each
direction by itself.
"""

from __future__ import annotations

import numpy as np


def by_distance(work: np.ndarray) -> np.ndarray:
    """[n, n]: [s, d] is the work of the queries of device d against the keys of device d - s."""
    d = np.arange(len(work))
    return work[d, (d - d[:, None]) % len(work)]


def steps(work: np.ndarray) -> np.ndarray:
    """[n // 2 + 1, n]: the work of each device at each step of a ring of two directions."""
    n, distance = len(work), by_distance(work)
    both = np.zeros((n // 2 + 1, n), work.dtype)
    both[:] = distance[: n // 2 + 1]
    both[1 : (n + 1) // 2] += distance[: n // 2 : -1]
    return both


def reach(work: np.ndarray) -> tuple[int, int]:
    """How far keys travel upward and downward, in devices, in a ring of two directions."""
    needed = np.flatnonzero(by_distance(work).any(axis=1))
    half = len(work) // 2
    upward, downward = needed[needed <= half], len(work) - needed[needed > half]
    return int(upward.max(initial=0)), int(downward.max(initial=0))


def lockstep_time(steps_SD: np.ndarray) -> float:
    """The time of steps [S, n] where all devices wait at each of them for the slowest."""
    return float(steps_SD.max(axis=1).sum())


def free_running_time(work: np.ndarray) -> float:
    """When the last device is done, where each waits for nothing but its keys.

    A device begins a step when it is done with the one before and has the keys; its neighbours send it the keys of
    step s when they begin step s - 1, and that takes no time.
    """
    upward, downward = reach(work)
    begun = done = np.zeros(len(work))
    for step, work_D in enumerate(steps(work)[: max(upward, downward) + 1]):
        begin = done
        if 0 < step <= upward:
            begin = np.maximum(begin, np.roll(begun, 1))
        if 0 < step <= downward:
            begin = np.maximum(begin, np.roll(begun, -1))
        begun, done = begin, begin + work_D
    return float(done.max())
