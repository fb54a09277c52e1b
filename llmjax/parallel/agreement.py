"""Communication between processes on the host, so that no process waits for another one that has failed.

A process that exits while the others are in a collective leaves them hanging. Therefore whatever depends on a disk,
an environment variable or a flag runs in `together`, after which either all processes continue or all end.
`check_same` compares what all processes must agree on. Every process must call these functions in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmjax.errors import UserError
from llmjax.parallel import hosts

Value = TypeVar("Value")


def gather(value: Any) -> list[Any]:
    """The `value` of every process, in the order of processes. It must be representable in JSON."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # Arrays must have the same shape everywhere, so the JSON texts are padded to the longest one.
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def from_primary(value: Any) -> Any:
    """The `value` of the first process, returned on all processes."""
    return gather(value if hosts.is_primary() else None)[0]


def together(act: Callable[[], Value]) -> Value:
    """The result of `act()`. If `act` fails on any process, all raise: the failing process its own error, the others
    a UserError that quotes it.

    `act` must not communicate with other processes.
    """
    error: Exception | None = None
    try:
        result = act()
    except Exception as raised:
        error = raised
    # All processes reach this collective, whether `act` has failed or not.
    sentences = gather("" if error is None else (str(error) or type(error).__name__))
    if error is not None:
        raise error
    failed = [number for number, sentence in enumerate(sentences) if sentence]
    if failed:
        sentence = sentences[failed[0]]
        raise UserError(f"process {failed[0]} of {len(sentences)} cannot go on: {sentence}")
    return result


def on_primary(act: Callable[[], Value]) -> Value:
    """The result of `act()` on the first process, returned on all processes. It must be representable in JSON. If
    `act` fails, all processes raise."""
    return from_primary(together(lambda: act() if hosts.is_primary() else None))


def check_same(seen: Mapping[str, str], remedy: str) -> None:
    """Raises a UserError on every process if `seen` differs between processes; it says which process sees which
    value.

    `seen` maps a description of each compared thing to its value as text. The first one that differs is named.
    """
    everyone = gather(dict(seen))
    for name in seen:
        processes: dict[str, list[int]] = {}
        for number, each in enumerate(everyone):
            processes.setdefault(each[name], []).append(number)
        if len(processes) > 1:
            text = ", ".join(f"{_ranges(numbers)} sees {value}" for value, numbers in processes.items())
            raise UserError(f"the {len(everyone)} processes differ in {name}: {text}; {remedy}")


def _ranges(numbers: list[int]) -> str:
    """These process numbers in words; at most 8 are listed."""
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"each of processes {shown}"
