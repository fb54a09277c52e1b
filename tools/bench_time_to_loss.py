"""Measures how long it takes from the start of a process to a held-out loss on Tiny Shakespeare, beside nanoGPT.

    pip install torch==2.13.0
    python tools/bench_time_to_loss.py --text=tinyshakespeare.txt

The text is github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt; without --text, the file is looked for in the
folder that the environment variable LLMJAX_SHARED names. Both sides hold out the last tenth of its characters, and are
to reach a loss of at most 1.88 nats per character there, over every character of it; each of them is one byte.

Ours is the command `python -m llmjax.main --config=configs/shakespeare.py`: from its start to its end, with evaluation,
sample, checkpoint and report. It is timed twice for each seed, with empty caches ("cold"), and again in a new workdir
("warm"), where tokens and compiled programs are found in the cache.

The rival is the recipe for a CPU in the README of nanoGPT, in PyTorch without compilation: 4 layers, 4 heads, 128 wide,
contexts of 64 characters, 12 of them an update, AdamW with beta2 = 0.99, 100 updates of warmup, a cosine to a tenth of
the learning rate, no dropout. Its time is that of a process that imports torch, trains and evaluates once. Its learning
rate and its number of updates were searched as well, with fewer tries than ours and on other seeds than those that are
timed: `RIVAL` has the fastest that was tried (`experiments/README.md`). The output has one JSON object in each line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from lines import can_run, make_parser, report

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Nats per character of the held-out tail, which nanoGPT's recipe reaches.
TARGET = 1.88
# The share of the time of the rival that ours may take, with empty caches and with full ones.
GOALS = {"cold": 1 / 3, "warm": 1 / 5}
# The fastest of the settings of the rival that were tried, and those of its README.
RIVAL = {"learning_rate": 4e-3, "updates": 1250}
RECIPE = {"learning_rate": 1e-3, "updates": 2000}
# Seeds that no setting was chosen by.
SEEDS = (101, 102, 103)
# Where the text lies in the folder LLMJAX_SHARED.
TEXT = "data/lm_en/tinyshakespeare.txt"
# A text and changes to configs/shakespeare.py with which a run ends at once.
SMOKE_TEXT = "To be, or not to be, that is the question.\n" * 300
SMOKE = {"model.num_layers": 1, "model.model_dim": 32, "train.num_updates": 2, "generate.max_tokens": 2,
         "optimizer.warmup_updates": 1}  # fmt: skip


def find_text(given: str | None) -> pathlib.Path | None:
    """The file to train on: `given`, else that in the folder LLMJAX_SHARED; None where neither is there."""
    shared = os.environ.get("LLMJAX_SHARED")
    path = pathlib.Path(given) if given else pathlib.Path(shared, TEXT) if shared else None
    return path if path is not None and path.is_file() else None


def learning_rate(update: int, peak: float, updates: int, warmup: int = 100) -> float:
    """The learning rate of nanoGPT's train.py at `update`, counted from 0."""
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    done = (update - warmup) / max(updates - warmup, 1)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def train_rival(text: pathlib.Path, seed: int, peak: float, updates: int) -> float:
    """Trains nanoGPT's model by its recipe, and returns the mean loss over the whole held-out tail, in nats."""
    import torch
    from nanogpt import GPT

    length, rows = 64, 12
    characters = text.read_text(encoding="utf-8")
    number = {character: i for i, character in enumerate(sorted(set(characters)))}
    ids = torch.tensor([number[character] for character in characters])
    # nanoGPT's data/shakespeare_char/prepare.py cuts here.
    train, tail = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    torch.manual_seed(seed)
    model = GPT(len(number), length, layers=4, width=128, heads=4, hidden=512)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=True)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, peak, updates)
        starts = torch.randint(len(train) - length, (rows,))
        batch = torch.stack([train[i : i + length + 1] for i in starts])
        model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Rows of 64 side by side: each character but the first is predicted once.
    whole = (len(tail) - 1) // length * length
    inputs, targets = tail[:whole].view(-1, length), tail[1 : whole + 1].view(-1, length)
    with torch.no_grad():
        losses = [
            float(model(inputs[i : i + 64], targets[i : i + 64])) * len(inputs[i : i + 64])
            for i in range(0, len(inputs), 64)
        ]
    return sum(losses) / len(inputs)


def time_rival(text: pathlib.Path, seed: int, peak: float, updates: int) -> tuple[float, float]:
    """The seconds of a process that trains the rival, and its loss."""
    words = ["--rival", str(seed), str(peak), str(updates), f"--text={text}"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *words], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])


def time_ours(
    text: pathlib.Path, seed: int, workdir: pathlib.Path, cache: pathlib.Path, changes: dict[str, object]
) -> tuple[float, float]:
    """The seconds of our command, with its caches in the folder `cache`, and its loss."""
    settings = {"seed": seed, "data.sources": text} | changes
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")
    }
    environment |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llmjax.main", "--config=configs/shakespeare.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT, env=environment)
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return seconds, [line for line in lines if line["kind"] == "evaluate"][-1]["loss"]


def bench(text: pathlib.Path | None, seeds: Sequence[int], settings: dict[str, float], smoke: bool) -> None:
    """Times both sides for each seed, in turns, and reports a line for cold and one for warm caches."""
    ours: dict[str, list[tuple[float, float]]] = {kind: [] for kind in GOALS}
    rival, tuned = [], settings | ({"updates": 2} if smoke else {})
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            if smoke:
                text = folder / "text.txt"
                text.write_text(SMOKE_TEXT, encoding="utf-8")
            rival.append(time_rival(text, seed, *tuned.values()))
            for kind, runs in ours.items():
                runs.append(time_ours(text, seed, folder / kind, folder / "cache", SMOKE if smoke else {}))
    for kind, runs in ours.items():
        ratio = statistics.median(mine[0] / theirs[0] for mine, theirs in zip(runs, rival, strict=True))
        reached = all(loss <= TARGET for _, loss in runs)
        report(
            f"time_to_loss_{kind}",
            statistics.median(seconds for seconds, _ in runs),
            "s",
            f"nanoGPT, learning rate {tuned['learning_rate']:g}, {tuned['updates']:,} updates",
            statistics.median(seconds for seconds, _ in rival),
            GOALS[kind],
            reached and ratio <= GOALS[kind],
            ratio=ratio,
            seconds=[round(seconds, 2) for seconds, _ in runs],
            losses=[round(loss, 4) for _, loss in runs],
            rival_seconds=[round(seconds, 2) for seconds, _ in rival],
            rival_losses=[round(loss, 4) for _, loss in rival],
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--text", help="tinyshakespeare.txt; by default that in the folder LLMJAX_SHARED")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--recipe", action="store_true", help="the rival as in its README, not as searched")
    parser.add_argument("--rival", nargs=3, metavar=("SEED", "RATE", "UPDATES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    text = find_text(args.text)
    if text is None and not args.smoke:
        print(
            "time_to_loss is left out: it needs tinyshakespeare.txt; give it by --text=FILE", file=sys.stderr
        )
    elif args.rival:
        seed, rate, updates = args.rival
        print(json.dumps(train_rival(text, int(seed), float(rate), int(updates))))
    elif can_run("time_to_loss", "torch", args.smoke):
        bench(
            text, args.seeds[:1] if args.smoke else args.seeds, RECIPE if args.recipe else RIVAL, args.smoke
        )


if __name__ == "__main__":
    main()
