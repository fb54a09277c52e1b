"""The work of ring attention for one row laid out over the devices of `mesh.seq`: counted on the host, not timed.

Attention works by blocks of queries and blocks of keys. It skips a pair of blocks if their spans show that no query
sees any key (`Mask.may_see`). The quality of a layout shows in the number of pairs that remain, how many of them were
necessary, how far keys travel, and which device waits for which.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data.layout import ring_cost
from llmjax.ops.attention.mask import Span, self_mask, span_of


@dataclasses.dataclass(frozen=True)
class RingWork:
    """Numbers of block pairs per pair of devices: [d, e] counts queries of device d with keys of device e.

    executed  int64 [n, n], the pairs that attention computes
    needed    int64 [n, n], the pairs in which some query sees some key
    """

    executed: np.ndarray
    needed: np.ndarray

    @property
    def executed_over_needed(self) -> float:
        return float(self.executed.sum() / max(1, self.needed.sum()))

    @property
    def hops(self) -> int:
        """The number of transfers in a ring of two directions, at most n - 1: the sum of both reaches."""
        return sum(self.reach)

    @property
    def reach(self) -> tuple[int, int]:
        """How far keys travel upward and downward, in devices."""
        return ring_cost.reach(self.executed)

    @property
    def lockstep_slowdown(self) -> float:
        """The time relative to perfect balance if all devices wait for the slowest one at each step."""
        return self._slowdown(ring_cost.lockstep_time(ring_cost.steps(self.executed)))

    @property
    def free_running_slowdown(self) -> float:
        """The time relative to perfect balance if each device waits for its keys only."""
        return self._slowdown(ring_cost.free_running_time(self.executed))

    @property
    def one_way_hops(self) -> int:
        """The number of transfers in a ring of one direction."""
        return int(np.flatnonzero(ring_cost.by_distance(self.executed).any(axis=1)).max(initial=0))

    @property
    def one_way_lockstep_slowdown(self) -> float:
        """`lockstep_slowdown` in a ring of one direction, which has n steps."""
        return self._slowdown(ring_cost.lockstep_time(ring_cost.by_distance(self.executed)))

    def _slowdown(self, time: float) -> float:
        return time * len(self.executed) / max(1, int(self.executed.sum()))


def ring_work(
    segments: np.ndarray,
    positions: np.ndarray,
    shards: int,
    block: int,
    *,
    causal: bool = True,
    window: int = 0,
) -> RingWork:
    """The work for a row with `segments` and `positions` [T], split over `shards` devices in contiguous parts.

    `block` is the number of tokens of a block.
    """
    segments, positions = (np.asarray(x, np.int32).reshape(shards, -1) for x in (segments, positions))
    size = min(block, segments.shape[1])
    segments, positions = (
        np.pad(x, ((0, 0), (0, -x.shape[1] % size))).reshape(-1, size) for x in (segments, positions)
    )
    device = np.arange(len(segments)) * shards // len(segments)

    def per_device(pairs: np.ndarray) -> np.ndarray:
        q, k = np.nonzero(pairs)
        return np.bincount(device[q] * shards + device[k], minlength=shards**2).reshape(shards, shards)

    # The spans come back to the host: `may_see` consists of operators, which numpy arrays have as well.
    segments_BX, positions_BX = jnp.asarray(segments), jnp.asarray(positions)
    spans: Any = jax.device_get(span_of(segments_BX, positions_BX))
    q, k = Span(*(x[:, None] for x in spans)), Span(*(x[None] for x in spans))
    may_see: Any = self_mask(segments_BX, positions_BX, causal=causal, window=window).may_see(q, k)
    return RingWork(
        per_device(may_see),
        per_device(_sees(segments, positions, causal, window)),
    )


def _sees(segments: np.ndarray, positions: np.ndarray, causal: bool, window: int) -> np.ndarray:
    """bool [blocks, blocks], whether some query of one block sees some key of the other.

    Sorted by (segment, position), the keys of one query are a range, and the keys of a block of queries a union of
    ranges.
    """
    count, size = segments.shape
    used = np.flatnonzero(segments)
    order = used[np.lexsort((positions.flat[used], segments.flat[used]))]
    segment, block, here = segments.flat[order], order // size, np.arange(len(order))
    start, stop = np.searchsorted(segment, segment, "left"), np.searchsorted(segment, segment, "right")
    # Positions of a document have no gaps, so a window in positions is a window in the sorted order.
    if window:
        start, stop = np.maximum(start, here - window + 1), np.minimum(stop, here + window)
    if causal:
        stop = here + 1
    sees = np.zeros((count, count), bool)
    members = np.split(np.argsort(block, kind="stable"), np.searchsorted(np.sort(block), np.arange(1, count)))
    for q, mine in enumerate(members):
        if len(mine):
            low, high = start[mine].min(), stop[mine].max()
            # The union of ranges as a running sum: +1 where a range starts, -1 where it stops.
            change = np.bincount(start[mine] - low, minlength=high - low + 1)
            change -= np.bincount(stop[mine] - low, minlength=high - low + 1)
            sees[q, block[low:high][np.cumsum(change[:-1]) > 0]] = True
    return sees
