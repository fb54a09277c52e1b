"""The time that ring attention takes, computed from a matrix of work.

`work` is an array [n, n]: work[d, e] is the work of attending from the queries of device d to the keys of device e, in
any unit. All times have the same unit.

Keys travel in both directions of the ring at once. At step 0 each device attends to its own keys. At step s, device d
attends to the keys of devices d - s and d + s, modulo n. If n is even, both are the same device at the last step,
n / 2, and its keys arrive in one direction only. In each direction keys travel only to the last device that needs them;
later steps are left out.
"""

from __future__ import annotations

import numpy as np


def by_distance(work: np.ndarray) -> np.ndarray:
    """Reorders work [n, n] by distance: entry [s, d] is the work of the queries of d against the keys of d - s."""
    d = np.arange(len(work))
    # Row s of the index array holds d - s for every device d.
    return work[d, (d - d[:, None]) % len(work)]


def steps(work: np.ndarray) -> np.ndarray:
    """The work of each device at each step of a ring of two directions: [n // 2 + 1, n] from work [n, n]."""
    n, distance = len(work), by_distance(work)
    both = np.zeros((n // 2 + 1, n), work.dtype)
    both[:] = distance[: n // 2 + 1]
    # Distance n - s in one direction is distance s in the other. Step 0 and, for even n, step n / 2 have one part only.
    both[1 : (n + 1) // 2] += distance[: n // 2 : -1]
    return both


def reach(work: np.ndarray) -> tuple[int, int]:
    """The number of hops that keys travel to higher and to lower device numbers, in a ring of two directions."""
    # Distance s above half the ring means s - n: the keys take the shorter way, downward.
    needed = np.flatnonzero(by_distance(work).any(axis=1))
    half = len(work) // 2
    upward, downward = needed[needed <= half], len(work) - needed[needed > half]
    return int(upward.max(initial=0)), int(downward.max(initial=0))


def lockstep_time(steps_SD: np.ndarray) -> float:
    """The time of steps [S, n] if all devices wait at each step for the slowest one."""
    return float(steps_SD.max(axis=1).sum())


def free_running_time(work: np.ndarray) -> float:
    """The time at which the last device has finished work [n, n], if each device waits for nothing but its keys.

    A device begins a step as soon as it has finished the step before and has the keys. Its neighbours send the keys of
    step s when they begin step s - 1. Sending takes no time in this model.
    """
    upward, downward = reach(work)
    begun = done = np.zeros(len(work))
    for step, work_D in enumerate(steps(work)[: max(upward, downward) + 1]):
        begin = done
        # np.roll by 1 gives device d the time of device d - 1, from which keys arrive in the upward direction.
        if 0 < step <= upward:
            begin = np.maximum(begin, np.roll(begun, 1))
        if 0 < step <= downward:
            begin = np.maximum(begin, np.roll(begun, -1))
        begun, done = begin, begin + work_D
    return float(done.max())
