"""Measures the sides of a comparison in turns, each in a process of its own.

Because the sides take turns, whatever slows the machine down for a while slows down all sides alike.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

# Does what is measured, and returns the measurement.
Work = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison.

    facts   what the maker of the side says about it
    values  the measurements, one for each round
    peak    the largest memory of its process, in bytes
    """

    facts: Any
    values: list[Any]
    peak: int


def seconds(work: Work) -> float:
    """Runs `work` and returns how many seconds it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(makes: Sequence[Callable[[], tuple[Work, Any]]], rounds: int) -> list[Side]:
    """Measures all sides `rounds` times, in turns, and returns them in the order of `makes`.

    Each of `makes` is called in the process of its side, so it must be possible to pickle it. It returns the work of
    the side and facts about it. The work must have run before, so that nothing is compiled while it is measured.
    """
    # A forked process would share the threads and locks of jax, and the memory of this one.
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, facts = [], [], []
    for make in makes:
        here, there = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(there, make), daemon=True))
        processes[-1].start()
        # Only the side holds the other end now, so that reading from one that has died fails and does not wait.
        there.close()
        pipes.append(here)
        facts.append(here.recv())
    values = [[] for _ in pipes]
    for _ in range(rounds):
        for pipe, mine in zip(pipes, values, strict=True):
            pipe.send(True)
            mine.append(pipe.recv())
    for pipe in pipes:
        pipe.send(False)
    peaks = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return [Side(*side) for side in zip(facts, values, peaks, strict=True)]


def _serve(pipe: Connection, make: Callable[[], tuple[Work, Any]]) -> None:
    """Runs in the process of a side: sends the facts, then a measurement for each request, then the peak memory."""
    work, facts = make()
    pipe.send(facts)
    while pipe.recv():
        pipe.send(work())
    # Linux gives it in units of 1024 bytes.
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
