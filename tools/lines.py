"""What all benchmarks have in common: their arguments, and the lines that they print.

A line is one JSON object with

    name, value, unit     what was measured
    rival, rival_value    what it is compared with; null where it stands alone
    ratio                 value / rival_value, or the median of the rounds' ratios
    goal, met             null where nothing was aimed at
    processor             the machine that it was measured on, or the TPU that it was compiled for

and whatever else belongs to the figure. `--smoke` runs a benchmark on sizes so small that its figures mean nothing,
within a minute: it shows that the benchmark still works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import sys
from typing import Any

EXTRAS = {"torch": "interop", "libtpu": "tpu"}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that knows --smoke."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only to see that it works")
    return parser


def this_machine() -> str:
    """The model of the CPU and how many cores of it there are."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def report(
    name: str,
    value: float,
    unit: str,
    rival: str | None = None,
    rival_value: float | None = None,
    goal: float | None = None,
    met: bool | None = None,
    *,
    ratio: float | None = None,
    processor: str = "",
    **more: Any,
) -> None:
    """Prints a line; `ratio` and `processor` are those of the two values and this machine unless they are given."""
    if ratio is None and rival_value:
        ratio = value / rival_value
    line = {"name": name, "value": value, "unit": unit, "rival": rival, "rival_value": rival_value}
    line |= {"ratio": ratio, "goal": goal, "met": None if met is None else bool(met)}
    line |= {"processor": processor or this_machine(), **more}
    rounded = {key: float(f"{item:.5g}") if isinstance(item, float) else item for key, item in line.items()}
    print(json.dumps(rounded), flush=True)


def can_run(what: str, needs: str, smoke: bool) -> bool:
    """Whether the package `needs` is there for `what`. Without it a smoke run says that it leaves `what` out; a real
    run goes on, and fails where the package is imported."""
    if not smoke or importlib.util.find_spec(needs) is not None:
        return True
    print(
        f"{what} is left out: {needs} is not installed; pip install 'llmjax[{EXTRAS[needs]}]'",
        file=sys.stderr,
    )
    return False
