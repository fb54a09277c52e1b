"""Every benchmark still works: it runs to its end on tiny sizes, and prints lines that can be read by a machine."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = sorted(path.stem for path in (ROOT / "tools").glob("bench_*.py"))
KEYS = {"name", "value", "unit", "rival", "rival_value", "ratio", "goal", "met", "processor"}
sys.path.insert(0, str(ROOT / "tools"))
lines = importlib.import_module("lines")


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_to_its_end_and_says_what_it_leaves_out(name):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", "--smoke"],
        cwd=ROOT, env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    for line in printed:
        assert line.keys() >= KEYS, line
        assert math.isfinite(line["value"]) and line["processor"]
        assert (line["rival"] is None) == (line["rival_value"] is None)
        assert (line["goal"] is None) == (line["met"] is None)
    absent = [package for package in lines.EXTRAS if importlib.util.find_spec(package) is None]
    assert printed or absent, "no line, though nothing that it needs is absent"
    assert absent or "is left out" not in done.stderr


def test_a_line_says_what_was_measured_beside_what_and_where(capsys):
    lines.report("a", 2.0, "s", "b", 4.0, 1.0, False, rounds=3)
    lines.report("a", 2.0, "s", processor="TPU v5e")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        "name": "a", "value": 2.0, "unit": "s", "rival": "b", "rival_value": 4.0, "ratio": 0.5, "goal": 1.0,
        "met": False, "processor": lines.this_machine(), "rounds": 3,
    }  # fmt: skip
    assert second.keys() == KEYS and second["processor"] == "TPU v5e" and second["rival"] is None


def test_a_line_names_the_extensions_that_decide_how_fast_a_processor_multiplies():
    cores = f"{os.cpu_count()} cores"
    intel = "model name\t: Xeon\nflags\t\t: sse avx avx2 avx512f avx512_bf16 amx_bf16\n"
    assert lines.describe_processor(intel) == f"Xeon, {cores}, AVX-512, AVX-512 bfloat16, AMX bfloat16"
    assert lines.describe_processor("model name: EPYC\nflags: avx avx2\n") == f"EPYC, {cores}, AVX2"
    assert lines.describe_processor("Features\t: asimd svebf16\n").endswith("NEON, SVE bfloat16")


def test_what_an_absent_package_is_needed_for_is_left_out_by_smoke_runs_alone(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lines.can_run("memory", "libtpu", smoke=False) and not lines.can_run(
        "memory", "libtpu", smoke=True
    )
    said = "memory is left out: libtpu is not installed; pip install 'llmjax[tpu]'\n"
    assert capsys.readouterr() == ("", said)
