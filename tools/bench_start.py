"""Measures how long llmjax takes to start: from the start of a process to its first loss, or to its first token.

    python tools/bench_start.py

first_loss_empty       the command `python -m llmjax.main --config=configs/base.py` with empty caches: a tokenizer is
                       trained, the text is tokenized, and every program is compiled
first_loss_cold        the same where tokenizer and tokens are in the cache, and no compiled program is
first_loss_warm        the same where compiled programs are in the cache, too
first_token_warm       `--mode=generate` on the run that was trained, until the first text is printed

Each is the time until the line with the first loss, or the first text after the prompt, is on standard output. Each
command runs in a process of its own, with caches in a folder of its own, and values are medians over the rounds. Run it
on an idle machine. The output has one JSON object in each line.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from lines import make_parser, report

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The most seconds that each may take.
GOALS = {"first_loss_empty": None, "first_loss_cold": 12.0, "first_loss_warm": 5.0, "first_token_warm": 3.0}
# Two updates, because the loss of the first one is printed when the second one is under way.
SHORT = {"train.num_updates": 2, "optimizer.warmup_updates": 1}
# Changes to configs/base.py that make a run end at once. Their {TEXT} is a file with a little text.
SMOKE = {
    "model.num_layers": 1, "model.model_dim": 16, "transformer.num_heads": 2, "tokenizer.kind": "byte",
    "data.sources": "{TEXT}", "data.seq_len": 32, "data.held_out_fraction": 0.1, "data.num_workers": 1,
    "train.tokens_per_update": 128, "generate.max_tokens": 2,
}  # fmt: skip


def seconds_to(start: str, words: Sequence[str], cache: pathlib.Path) -> float:
    """The seconds from the start of the command with the arguments `words` until it prints `start` and more after it.

    Then waits for its end. Raises RuntimeError where it prints no such text.
    """
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment |= {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "llmjax.main", *words], stdout=subprocess.PIPE, env=environment, cwd=ROOT
    )
    assert process.stdout is not None
    said, seconds = b"", None
    while seconds is None and (more := os.read(process.stdout.fileno(), 2**16)):
        said += more
        _, found, after = said.partition(start.encode())
        if found and after.strip():
            seconds = time.perf_counter() - began
    if seconds is None:
        raise RuntimeError(f"{words} ended without {start!r}: {said.decode(errors='replace')[-500:]}")
    # A process that is killed may not have put all programs into the cache. This one goes on to its end.
    process.communicate()
    return seconds


def measure(rounds: int, changes: dict[str, object]) -> dict[str, list[float]]:
    """The seconds of each round, by the name of what was measured."""
    values: dict[str, list[float]] = {name: [] for name in GOALS}
    settings = [f"--config.{key}={value}" for key, value in changes.items()]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            cache = folder / "cache"
            text = folder / "text.txt"
            text.write_text("To be, or not to be, that is the question.\n" * 200, encoding="utf-8")
            train = ["--config=configs/base.py", *(word.replace("{TEXT}", str(text)) for word in settings)]
            for name in ("first_loss_empty", "first_loss_cold", "first_loss_warm"):
                if name == "first_loss_cold":
                    shutil.rmtree(cache / "llmjax" / "compiled")
                words = [*train, f"--workdir={folder / name}"]
                values[name].append(seconds_to("update 1/2  loss", words, cache))
            generate = [f"--workdir={folder / 'first_loss_warm'}", "--mode=generate", "--prompt=To "]
            # The first time it compiles.
            seconds_to("To ", generate, cache)
            values["first_token_warm"].append(seconds_to("To ", generate, cache))
    return values


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds, changes = (1, SHORT | SMOKE) if args.smoke else (args.rounds, SHORT)
    for name, values in measure(rounds, changes).items():
        median, goal = statistics.median(values), GOALS[name]
        met = None if goal is None else median <= goal
        report(name, median, "s", goal=goal, met=met, rounds=[round(value, 2) for value in values])


if __name__ == "__main__":
    main()
