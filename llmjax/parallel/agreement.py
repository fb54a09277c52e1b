"""What several processes tell each other before they work together, so that none waits for one that has given up.

A process that ends with a sentence while the others are in a collective leaves them hanging. So whatever
depends on a disk, an environment or a flag is done in `together`, after which all go on or all end; and what
all must see alike is compared in `check_same`. Every process must call these, in the same order.
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
    """The `value` of every process, in their order; it must be plain, as JSON holds it."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def from_primary(value: Any) -> Any:
    """The `value` of the first process, on all of them."""
    return gather(value if hosts.is_primary() else None)[0]


def together(act: Callable[[], Value]) -> Value:
    """What `act()` gives. Where it fails on one process, every process raises: the others a UserError that says why.

    `act` must not communicate with other processes.
    """
    error: Exception | None = None
    try:
        result = act()
    except Exception as raised:
        error = raised
    sentences = gather("" if error is None else (str(error) or type(error).__name__))
    if error is not None:
        raise error
    failed = [number for number, sentence in enumerate(sentences) if sentence]
    if failed:
        sentence = sentences[failed[0]]
        raise UserError(f"process {failed[0]} of {len(sentences)} cannot go on: {sentence}")
    return result


def on_primary(act: Callable[[], Value]) -> Value:
    """What `act()` gives on the first process, on all of them: plain, as JSON holds it. Where it fails, all raise."""
    return from_primary(together(lambda: act() if hosts.is_primary() else None))


def check_same(seen: Mapping[str, str], remedy: str) -> None:
    """UserError on every process where not all of them see the same, saying which process sees what.

    `seen` has words for each thing that is compared; the first that differs is named.
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
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"each of processes {shown}"
