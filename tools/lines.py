"""What all benchmarks have in common: their arguments, and the lines that they print.

Each line is a JSON object with these keys, and with others that belong to the figure:

    name, value, unit     what was measured
    rival, rival_value    what it is compared with, or null if there is nothing to compare it with
    ratio                 value / rival_value, or the median of the ratios of each round
    goal, met             the goal and whether it was met, or null if there is no goal
    processor             the machine that it was measured on, or the TPU that it was compiled for

With `--smoke` a benchmark uses sizes so small that it ends within a minute and its figures mean nothing. This shows
that the benchmark still works.
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

# Package -> the extra of llmjax that installs it.
EXTRAS = {"torch": "interop", "transformers": "interop", "libtpu": "tpu"}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the command line with the flag --smoke. `description` is shown as it is written."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only to see that it works")
    return parser


# Extensions of the instruction set that decide how fast a CPU multiplies, by a name for people -> the flag in
# /proc/cpuinfo. Of the vector extensions only the first that is there is told, and all of the matrix extensions.
VECTORS = {"AVX-512": "avx512f", "AVX2": "avx2", "AVX": "avx", "SVE": "sve", "NEON": "asimd"}
MATRICES = {
    "AVX-512 bfloat16": "avx512_bf16",
    "AMX bfloat16": "amx_bf16",
    "SME": "sme",
    "SVE bfloat16": "svebf16",
}


def this_machine() -> str:
    """This machine as `describe_processor` describes it."""
    info = pathlib.Path("/proc/cpuinfo")
    return describe_processor(info.read_text(encoding="utf-8") if info.exists() else "")


def describe_processor(cpuinfo: str) -> str:
    """The model of the CPU, its number of cores, and its vector and matrix extensions, from the text of /proc/cpuinfo,
    as in `Intel(R) Xeon(R) Processor, 2 cores, AVX-512, AMX bfloat16`."""
    parts = (line.partition(":") for line in cpuinfo.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in parts}
    model = facts.get("model name") or platform.processor() or platform.machine()
    # The key on x86, and the key on ARM.
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    vectors = [name for name, flag in VECTORS.items() if flag in flags][:1]
    matrices = [name for name, flag in MATRICES.items() if flag in flags]
    return ", ".join([model, f"{os.cpu_count()} cores", *vectors, *matrices])


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
    """Prints a line with numbers of five significant digits.

    The arguments are the keys of a line, see the beginning of this file; `more` has the keys that belong to the figure
    alone. If no `ratio` is given, it is value / rival_value. If no `processor` is given, it is this machine.
    """
    if ratio is None and rival_value:
        ratio = value / rival_value
    line = {"name": name, "value": value, "unit": unit, "rival": rival, "rival_value": rival_value}
    line |= {"ratio": ratio, "goal": goal, "met": None if met is None else bool(met)}
    line |= {"processor": processor or this_machine(), **more}
    rounded = {key: float(f"{item:.5g}") if isinstance(item, float) else item for key, item in line.items()}
    print(json.dumps(rounded), flush=True)


def can_run(what: str, needs: str, smoke: bool) -> bool:
    """Whether the part `what` of a benchmark can run, which needs the package `needs`.

    If the package is missing, a smoke run says that it leaves the part out. Any other run goes on, and fails where the
    package is imported, because the user has asked for this part.
    """
    if not smoke or importlib.util.find_spec(needs) is not None:
        return True
    print(
        f"{what} is left out: {needs} is not installed; pip install 'llmjax[{EXTRAS[needs]}]'",
        file=sys.stderr,
    )
    return False
