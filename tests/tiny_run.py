"""Runs so small that tests can afford complete ones: their corpus, their command line, and readers of their output."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import pkgutil
import random
import sys
import types
from collections.abc import Iterator, Sequence
from subprocess import PIPE, Popen

import pytest
import quick

from llmjax.workdir.metrics import read_line

ROOT = pathlib.Path(__file__).parents[1]
BASE = f"--config={ROOT / 'configs' / 'base.py'}"
# A time span as a person reads it. A test knows no more of how long something took: machines differ.
DURATION = r"(\d+ d \d+ h|\d+ h \d\d min|\d+ min \d\d s|[\d.]+ s|\d+×10⁻[⁰¹²³⁴⁵⁶⁷⁸⁹]+ s)"
# The settings of a tiny run, which differ from configs/base.py.
SETTINGS = {
    "model.num_layers": 1, "model.model_dim": 16, "transformer.num_heads": 2, "transformer.mlp_dim": 32,
    "tokenizer.kind": "byte", "data.seq_len": 32, "data.held_out_fraction": 0.1, "data.num_workers": 1,
    "train.num_updates": 6, "train.tokens_per_update": 512, "compute.accumulation_steps": 2,
    "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "optimizer.warmup_updates": 2,
    "evaluate.every": 3, "checkpoint.every": 2, "generate.max_tokens": 6,
}  # fmt: skip
WORDS = (
    "river",
    "stone",
    "cloud",
    "light",
    "code",
    "loop",
    "train",
    "model",
    "token",
    "batch",
    "update",
    "seed",
)
CHINESE = "春江潮水连海平，海上明月共潮生。滟滟随波千万里，何处春江无月明！"


def write_corpus(folder: pathlib.Path, documents: int = 40, words: int = 60, text: str = "") -> pathlib.Path:
    """Writes `documents` text files of 2 to 2 * `words` random words and then `text`. Returns `folder`."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        chosen = rng.choices(WORDS, k=rng.randint(2, 2 * words))
        (folder / f"{i:03d}.txt").write_text(" ".join(chosen) + text, encoding="utf-8")
    return folder


def write_pairs(folder: pathlib.Path, pairs: int = 200) -> pathlib.Path:
    """Writes a file of pairs to learn: words, and a character for each of them. Returns `folder`."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(pairs):
            chosen = rng.choices(range(6), k=rng.randint(1, 3))
            source, text = " ".join(WORDS[i] for i in chosen), "".join("河石云光码环"[i] for i in chosen)
            file.write(json.dumps({"source": source, "text": text}) + "\n")
    return folder


def settings_of(family: str) -> dict[str, object]:
    """`SETTINGS` for a model family, without the keys of the section `transformer` if it does not read them."""
    reads = family in ("gpt", "bert", "encoder_decoder")
    return {key: value for key, value in SETTINGS.items() if reads or not key.startswith("transformer.")}


def command(folder: pathlib.Path, *words: str, **settings: object) -> list[str]:
    """The arguments of a tiny run on `folder`/corpus, cached in `folder`/cache; `a__b=v` sets --config.a.b=v."""
    own = settings_of(str(settings.get("model__family", "gpt")))
    values = {"data.sources": folder / "corpus", "data.cache_dir": folder / "cache", **own}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return ["llmjax", BASE, *(f"--config.{key}={value}" for key, value in values.items()), *words]


def start(arguments: Sequence[str], stdout: int = PIPE, stderr: int = PIPE, **environment: str) -> Popen:
    """Starts a run with these arguments (`command`) in a process of its own, on one CPU device."""
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(quick.FLAGS),
        **environment,
    }
    program = [sys.executable, "-m", "llmjax.main", *arguments[1:]]
    return Popen(program, cwd=ROOT, env=env, text=True, stdout=stdout, stderr=stderr)


def finish(process: Popen) -> str:
    """Waits for the process and returns what it printed. It must end with code 0 and print nothing to stderr."""
    out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), f"exit code {process.returncode}\n{out}\n{err}"
    return out


def read_lines(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without the values that depend on the clock. Every line must be complete."""
    timing = ("seconds", "tokens_per_second", "data_wait", "mfu")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def lines_of(workdir: pathlib.Path) -> list[dict]:
    """The readable lines of metrics.jsonl, with all numbers as floats; no lines if there is no file."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = (read_line(line) for line in path.read_bytes().splitlines()) if path.exists() else ()
    return [line for line in lines if line is not None]


def losses(workdir: pathlib.Path) -> list[float]:
    """The training loss of each update."""
    return [line["loss"] for line in read_lines(workdir) if line["kind"] == "train"]


@contextlib.contextmanager
def compiled_once(folder: pathlib.Path) -> Iterator[None]:
    """Within the `with` block, a program that was compiled before is read from the compilation cache in `folder`."""
    # Not at the top, because some users of this module only start processes and need no jax.
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def in_modes(name: str) -> object:
    """The object called `name` in the files of llmjax/modes."""
    return getattr(_modes_with(name)[0], name)


def replace_in_modes(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Replaces `name` in every file of llmjax/modes that defines or imports it."""
    for module in _modes_with(name):
        monkeypatch.setattr(module, name, value)


def _modes_with(name: str) -> list[types.ModuleType]:
    """The files of llmjax/modes that define or import `name`."""
    # Not at the top, because some users of this module only start processes.
    from llmjax import modes

    files = [
        importlib.import_module(file.name)
        for file in pkgutil.walk_packages(modes.__path__, f"{modes.__name__}.")
        if not file.ispkg
    ]
    found = [file for file in files if hasattr(file, name)]
    assert found, f"no file of llmjax/modes knows {name}"
    return found
