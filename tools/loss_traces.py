"""Finds out whether a change of the code changes any number of a training run, by comparing loss traces bit by bit.

    python tools/loss_traces.py record before.json    # on the old code: about a quarter of an hour on two cores
    python tools/loss_traces.py record after.json     # on the new code
    python tools/loss_traces.py compare before.json after.json

A trace is what metrics.jsonl says about each update and each evaluation, without values that depend on the clock. There
is a trace for a tiny form of every file in configs/, for forty configs that are drawn at random, and for a run that
ends after a part of its updates and is resumed. `--change old.key=new.key` says that a key was renamed between the two
versions of the code.

Everything runs through the command line on eight simulated CPU devices. The script therefore works with versions of the
code that have nothing but the command line in common. `compare` ends with the exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from llmjax.main import main  # noqa: E402

# The keys of metrics.jsonl whose values depend on the clock or on the machine.
CLOCK = ("seconds", "tokens_per_second", "data_wait", "mfu", "save_seconds", "peak_bytes")
# What makes any config tiny: a run of a few seconds.
TINY = {
    "model.num_layers": 2, "model.model_dim": 32, "transformer.num_heads": 4, "transformer.num_kv_heads": 0,
    "transformer.head_dim": 0,
    "transformer.mlp_dim": 64, "transformer.window": 0, "tokenizer.kind": "byte", "tokenizer.num_reserved": 15,
    "tokenizer.path": "", "data.seq_len": 64, "data.held_out_fraction": 0.1, "data.num_workers": 1,
    "data.length_points": "", "train.num_updates": 5, "train.tokens_per_update": 2048, "compute.micro_batch_size": 0,
    "compute.accumulation_steps": 2, "train.batch_schedule": "constant", "train.batch_points": "",
    "optimizer.warmup_updates": 2, "optimizer.schedule_updates": 0, "evaluate.every": 2, "evaluate.batch_size": 8,
    "checkpoint.every": 2, "checkpoint.init_from": "", "generate.max_tokens": 3, "mesh.data": -1, "mesh.fsdp": 1,
    "mesh.seq": 1, "mesh.tensor": 1, "plan.topology": "",
}  # fmt: skip
# What takes the place of the keys of Transformers in configs of another family.
TINY_FAMILIES = {"lstm_article": {"lstm.hidden_dim": 48}}
# Key -> the values that it may get in a config that is drawn. A value that stands twice is drawn twice as often. A
# value of "mesh" is itself a dict of settings.
CHOICES = {
    "transformer.activation": ("swiglu", "gelu", "relu2"),
    "transformer.norm": ("rmsnorm", "layernorm"),
    "transformer.position": ("rope", "learned", "sinusoidal"),
    "transformer.num_kv_heads": (0, 2),
    "transformer.qk_norm": (True, False),
    "transformer.use_bias": (True, False),
    "model.tie_embeddings": (True, False),
    "model.logit_softcap": (0.0, 20.0),
    "transformer.window": (0, 16),
    "transformer.global_every": (0, 2),
    "transformer.attention_softcap": (0.0, 30.0),
    "transformer.attention_sinks": (True, False),
    "model.dropout": (0.0, 0.1),
    "compute.scan_layers": (True, False),
    "compute.remat": ("none", "dots", "attention", "full"),
    "compute.tile": (0, 24),
    "compute.kernel": ("auto", "full", "blockwise"),
    "model.dtype": ("float32", "bfloat16"),
    "data.length_points": ("", "0:32,4096:64"),
    "mesh": (
        {},
        {"mesh.fsdp": 2},
        {"mesh.tensor": 2},
        {"mesh.fsdp": 2, "mesh.seq": 2, "mesh.seq_attention": "ring"},
        {"mesh.seq": 2, "mesh.tensor": 2, "mesh.layout": "zigzag"},
        {"mesh.seq": 4, "mesh.seq_attention": "gather"},
    ),
    "compute.engine": ("in_place", "multisteps", "fused"),
    "compute.gather": ("micro_step", "update"),
    "compute.accumulation_steps": (1, 2),
    "train.batch_schedule": ("constant", "constant", "piecewise"),
    "train.z_loss": (0.0, 1e-3),
    "train.statistics_every": (0, 2),
    "optimizer.name": ("adamw", "lion", "adafactor", "muon", "schedule_free_adamw"),
    "optimizer.schedule": ("cosine", "linear", "constant", "wsd"),
    "muon.form": ("debiased", "reference"),
    "optimizer.clip": ("global", "block", "adaptive"),
    "optimizer.batch_scaling": ("none", "sqrt"),
    "optimizer.constant_in": ("updates", "tokens"),
    "controller.name": ("none", "none", "noise_scale"),
}


def drawn(seed: int) -> dict[str, object]:
    """The settings of the config that is drawn with `seed`, {whole key: value}. They obey the rules of the config."""
    rng, settings = random.Random(seed), {}
    for key, values in CHOICES.items():
        value = rng.choice(values)
        settings |= value if isinstance(value, dict) else {key: value}
    # A schedule needs points, and only one of schedule and controller may decide about the batch.
    if settings["train.batch_schedule"] == "piecewise":
        settings["train.batch_points"] = "0:2048,4096:4096"
        settings["controller.name"] = "none"
    if settings["optimizer.name"] == "schedule_free_adamw":
        settings["optimizer.schedule"] = "constant"
    # It is drawn for the other optimizers too, so that the draws after it are the same.
    if settings["optimizer.name"] != "muon":
        del settings["muon.form"]
    if not settings["transformer.window"]:
        settings["transformer.global_every"] = 0
    return settings | {"seed": seed}


def write_corpus(folder: pathlib.Path) -> None:
    """Writes 60 documents of 2 to 120 English and Chinese words."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    words = re.split(
        " ", "river stone cloud light loop model token batch update seed 春江 潮水 明月 海上 千里"
    )
    for i in range(60):
        (folder / f"{i:03d}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(2, 120))), "utf-8")


def run(
    folder: pathlib.Path, name: str, config: str, settings: dict[str, object], renamed: dict[str, str]
) -> str:
    """Trains in `folder`/`name`, in a process of its own. Returns nothing if the run ended well, else its last line.

    `renamed` has the new names of keys that were renamed.
    """
    values = TINY | {"data.sources": folder / "corpus", "data.cache_dir": folder / "cache"} | settings
    if pathlib.Path(config).stem in TINY_FAMILIES:
        values = {key: value for key, value in values.items() if not key.startswith("transformer.")}
    arguments = [f"--config.{renamed.get(key, key)}={value}" for key, value in values.items()]
    words = ["llmjax", f"--config={ROOT / 'configs' / config}", f"--workdir={folder / name}", *arguments]
    # What the run prints.
    said = folder / "said.txt"

    def child() -> None:
        with said.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(words)
        # Not sys.exit, which would also run what the parent process has left to do at its end.
        os._exit(code)

    # A forked process has jax imported already, which would take seconds for each run.
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    last = said.read_text().strip().splitlines()[-1:] or [""]
    return "" if process.exitcode == 0 else f"exit code {process.exitcode}: {last[0]}"


def trace(workdir: pathlib.Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without `CLOCK`. JSON writes each float so that reading it gives the same bits."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def record(path: pathlib.Path, count: int, renamed: dict[str, str]) -> None:
    """Writes the traces of all runs to `path`, and prints a line after each. `count` configs are drawn."""
    runs: list[tuple[str, str, dict[str, object]]] = []
    runs += [
        (config.stem, config.name, TINY_FAMILIES.get(config.stem, {}))
        for config in sorted((ROOT / "configs").glob("*.py"))
    ]
    runs += [(f"drawn_{seed}", "base.py", drawn(seed)) for seed in range(count)]
    # The same run twice: the second time it goes on from update 3.
    runs += [
        ("resumed", "base.py", {"train.num_updates": n, "optimizer.schedule_updates": 5}) for n in (3, 5)
    ]
    traces: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_corpus(folder / "corpus")
        for name, config, settings in runs:
            failure = run(folder, name, config, settings, renamed)
            traces[name] = {"failure": failure, "lines": trace(folder / name)}
            print(f"{name}: {len(trace(folder / name))} lines {failure}".replace(scratch, ""), flush=True)
            traces[name]["failure"] = failure.replace(scratch, "")
            # Written after each run, so that an interrupted recording is not lost.
            path.write_text(json.dumps(traces, indent=1))


def compare(before: pathlib.Path, after: pathlib.Path) -> int:
    """Prints which traces differ, and their first different lines. Returns 1 if any do, otherwise 0."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    differ = 0
    for name in sorted(old | new):
        if old.get(name) == new.get(name):
            continue
        differ += 1
        here, there = old.get(name, {"lines": []}), new.get(name, {"lines": []})
        pairs = zip(here["lines"], there["lines"])
        first = next((f"{a} became {b}" for a, b in pairs if a != b), f"{here} became {there}"[:500])
        print(f"{name}: {first}")
    failed = sum(bool(one["failure"]) for one in old.values())
    print(f"{len(old | new)} traces, {failed} of them of configs that are refused, {differ} differ")
    return 1 if differ else 0


def parse_and_run() -> int:
    """Reads the command line, does what it says, and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=40, help="how many configs are drawn")
    parser.add_argument("--change", action="append", default=[], help="OLD.KEY=NEW.KEY")
    arguments = parser.parse_args()
    if arguments.action == "compare":
        return compare(*arguments.files)
    record(*arguments.files, arguments.count, dict(pair.split("=") for pair in arguments.change))
    return 0


if __name__ == "__main__":
    sys.exit(parse_and_run())
