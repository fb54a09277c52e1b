"""Counts what ring attention has to compute and to send with each layout of packed rows, and times the layouts.

    python tools/bench_layout.py --rows web web_mixed --shards 8 32 --block 128 256 512

The lengths of documents are drawn at random. The documents are packed as the pipeline packs them (`plan_packing`). Rows
called mixed are filled with documents one after the other, as they are drawn. The figures are means over the rows. The
rival is the layout that gives each device a contiguous part of the row. The output has one JSON object in each line.

    executed_over_needed   pairs of blocks that attention computes, divided by those in which a query sees a key
    executed_over_whole    the same pairs, divided by those that attention would compute on one device
    lockstep_slowdown      time divided by the time with perfect balance, if all devices wait for the slowest one at
                           each step of the ring
    free_running_slowdown  the same, if each device waits only until its keys arrive
    one_way_...            the same in a ring whose keys travel in one direction only
    hops                   from how many devices away keys come, in both directions together
    milliseconds           the time to compute the order of one row
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
from lines import make_parser, report

from llmjax.data.layout.layout import LAYOUTS, RowLayout
from llmjax.data.packing.make_plan import plan_packing
from llmjax.plan.ring_work import ring_work

# The documents that are drawn and packed. A choice: many more than there are in the rows that are measured.
DOCUMENTS = 100_000
# The layout that all others are compared with.
RIVAL = "contiguous"
# Figure -> its unit. All other figures are ratios.
UNITS = {"hops": "hops", "one_way_hops": "hops", "milliseconds": "ms"}


def web(rng: np.random.Generator, count: int, sigma: float = 1.1) -> np.ndarray:
    """Lengths of `count` documents as on the web, int64 [count]: log-normal, with a median of 545 tokens.

    `sigma` is the standard deviation of their logarithms.
    """
    return np.maximum(1, np.rint(545 * np.exp(sigma * rng.standard_normal(count)))).astype(np.int64)


def novels(rng: np.random.Generator) -> np.ndarray:
    """Lengths of 8 novels, and of poems with about as many tokens in all."""
    return np.concatenate([rng.integers(300_000, 900_000, 8), rng.integers(20, 200, 40_000)])


def packed(lengths: np.ndarray, seq_len: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Packs documents and draws `count` rows. Returns the lengths of the documents in each row."""
    # A document of n + 1 tokens has n positions in a row.
    plan = plan_packing(lengths + 1, np.arange(len(lengths)), seq_len, seed=0)
    rows = rng.choice(plan.num_rows, min(count, plan.num_rows), replace=False)
    return [plan.lengths[plan.offsets[row] : plan.offsets[row + 1]] for row in rows]


def mixed(sigma: float, seq_len: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`count` rows filled with documents in the order in which they are drawn; the last one is cut."""
    rows = []
    for _ in range(count):
        # Enough documents to fill a row: they have far more than 50 tokens on average.
        ends = np.minimum(np.cumsum(web(rng, seq_len // 50, sigma)), seq_len)
        lengths = np.diff(ends, prepend=0)
        rows.append(lengths[lengths > 0])
    return rows


# Kind of rows -> a function (tokens of a row, number of rows, random generator) that returns the lengths of the
# documents in each row.
ROWS: dict[str, Callable[..., list[np.ndarray]]] = {
    "web": lambda T, count, rng: packed(web(rng, DOCUMENTS), T, count, rng),
    "web_mixed": lambda T, count, rng: mixed(1.1, T, count, rng),
    "heavy": lambda T, count, rng: packed(web(rng, DOCUMENTS, 1.5), T, count, rng),
    "heavy_mixed": lambda T, count, rng: mixed(1.5, T, count, rng),
    "novels": lambda T, count, rng: packed(novels(rng), T, count, rng),
    "equal_8k": lambda T, count, rng: [np.full(T // 8192, 8192)],
    "one": lambda T, count, rng: [np.array([T])],
    "two": lambda T, count, rng: [np.array([T * 11 // 20, T - T * 11 // 20])],
}


def fields(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions, int [seq_len] each, of a row with documents of these lengths one after the other."""
    # What the documents leave free is padding, segment 0.
    counts = np.append(lengths, seq_len - lengths.sum())
    segments = np.repeat(np.append(np.arange(1, len(counts)), 0), counts)
    return segments, np.arange(seq_len) - np.repeat(np.cumsum(counts) - counts, counts)


def measure(rows: list[np.ndarray], layout: RowLayout, seq_len: int) -> dict[str, float]:
    """The figures of a layout, see the beginning of this file: means over the rows."""
    results = []
    for lengths in rows:
        began = time.perf_counter()
        order, segment_of = layout.order(lengths, seq_len)
        seconds = time.perf_counter() - began
        segments, positions = fields(lengths, seq_len)
        whole = ring_work(segments, positions, 1, layout.block)
        work = ring_work(segment_of[segments[order]], positions[order], layout.shards, layout.block)
        results.append(
            {
                "executed_over_needed": work.executed_over_needed,
                "executed_over_whole": work.executed.sum() / whole.executed.sum(),
                "lockstep_slowdown": work.lockstep_slowdown,
                "free_running_slowdown": work.free_running_slowdown,
                "hops": work.hops,
                "one_way_lockstep_slowdown": work.one_way_lockstep_slowdown,
                "one_way_hops": work.one_way_hops,
                "milliseconds": 1e3 * seconds,
            }
        )
    return {name: float(f"{np.mean([r[name] for r in results]):.4g}") for name in results[0]}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=["web", "web_mixed"], choices=ROWS)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--seq_len", type=int, default=131072)
    parser.add_argument("--shards", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--block", nargs="+", type=int, default=[256])
    parser.add_argument("--count", type=int, default=32, help="rows of each kind")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.seq_len, args.shards, args.block, args.count = ["web_mixed"], 8192, [4], [128], 2
    for kind in args.rows:
        rows = ROWS[kind](args.seq_len, args.count, np.random.default_rng(0))
        for shards, block in itertools.product(args.shards, args.block):
            rival = measure(rows, RowLayout(RIVAL, shards, block), args.seq_len)
            for name in args.layouts:
                layout = RowLayout(name, shards, block)
                layout.check(args.seq_len)
                found = measure(rows, layout, args.seq_len)
                more = {"rows": kind, "shards": shards, "block": block, "layout": name}
                for what, value in found.items():
                    report(f"layout_{what}", value, UNITS.get(what, ""), RIVAL, rival[what], **more)


if __name__ == "__main__":
    main()
