"""Sides of a comparison that take turns, each in a process of its own: what befalls the machine befalls all."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Side:
    """facts: what its maker says of it; values: of its work, one a round; peak: bytes that its process took at most."""

    facts: Any
    values: list[Any]
    peak: int


def seconds(work: Work) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(makes: Sequence[Callable[[], tuple[Work, Any]]], rounds: int) -> list[Side]:
    """Each of `makes` (picklable) gives its work, which measures itself and is warm, and its facts."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes, facts = [], [], []
    for make in makes:
        here, there = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(there, make), daemon=True))
        processes[-1].start()
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
    work, facts = make()
    pipe.send(facts)
    while pipe.recv():
        pipe.send(work())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
