"""Measures how many tokens per second our base model trains on, beside a PyTorch model in the style of nanoGPT.

    pip install torch==2.13.0
    python tools/bench_train.py

Both have the same layers, width, heads, vocabulary and tokens, float32, and AdamW with clipping. Ours is the training
step of `configs/base.py` with another optimizer, on packed documents: RoPE, QK-norm, SwiGLU, segments in the attention
mask, exact sums. The rival is the model of nanoGPT (`nanogpt.py`) with fused AdamW. Its feed-forward layer is so wide
that it has the same number of weights as ours.

Each side runs in a process of its own, and the two take turns. Values are medians over the rounds, and the ratio is the
median of the ratios of each round. The output has one JSON object in each line. Run it on an idle machine.
"""

from __future__ import annotations

import functools
import pathlib
import runpy
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from lines import can_run, make_parser, report
from turns import seconds, take_turns

from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import Derived, resolve_config
from llmjax.config.schema import Config
from llmjax.parallel.host_memory import keep_freed_memory
from llmjax.train.steering.batch_schedule import BatchArithmetic
from llmjax.types import Batch

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The goal of the ratio ours / rival: as fast as PyTorch.
GOAL = 1.0
# Changes to configs/base.py that both sides have.
ALIKE = {"optimizer.name": "adamw", "compute.accumulation_steps": 1}
# Updates before the first one that is measured. A choice: the first compiles, and memory is allocated in the next.
WARMUP_UPDATES = 3
# The shapes that can be measured, as changes to configs/base.py. 12m has about 12 million parameters.
SHAPES = {
    "base": {**ALIKE, "train.tokens_per_update": 8 * 512},
    "12m": {
        **ALIKE,
        "train.tokens_per_update": 4 * 512,
        "model.num_layers": 6,
        "model.model_dim": 384,
        "transformer.num_heads": 6,
        "tokenizer.vocab_size": 8192,
    },
    "smoke": {
        **ALIKE,
        "train.tokens_per_update": 4 * 32,
        "data.seq_len": 32,
        "model.num_layers": 1,
        "model.model_dim": 32,
        "transformer.num_heads": 2,
        "tokenizer.vocab_size": 512,
    },
}


def load_config(changes: dict[str, Any], num_devices: int = 1) -> tuple[Config, Derived]:
    """configs/base.py with these changes, {whole key: value}, resolved for a number of devices."""
    raw = runpy.run_path(str(ROOT / "configs" / "base.py"))["get_config"]()
    raw.update_from_flattened_dict(changes)
    return resolve_config(read_config(raw.to_dict()), num_devices)


def packed_batch(rng: np.random.Generator, vocab: int, rows: int, length: int, first: int) -> Batch:
    """A batch of random tokens, `rows` x `length`, in documents of log-normal length that fill each row.

    `first` is the number of the first row in the data. The median document has about 245 tokens.
    """
    tokens = rng.integers(0, vocab, (rows, length + 1), dtype=np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        start = document = 0
        while start < length:
            document += 1
            end = min(length, start + 1 + int(rng.lognormal(5.5, 1.0)))
            segments[row, start:end] = document
            positions[row, start:end] = np.arange(end - start)
            start = end
    weights = np.ones((rows, length), np.float32)
    index = np.arange(first, first + rows, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions, index)


def make_ours(config: Config, derived: Derived) -> tuple[Callable[[], float], int]:
    """A function that makes one update and returns its loss, and the number of parameters."""
    vocab, batch = config.tokenizer.vocab_size, derived.batch
    program = make_program(config, derived, vocab)
    state = program.init()
    size = sum(x.size for x in jax.tree.leaves(state.params))
    rng, rows = np.random.default_rng(0), batch.micro_batch_size
    micro = [packed_batch(rng, vocab, rows, batch.seq_len, i * rows) for i in range(batch.accumulation_steps)]
    shardings = jax.tree.map(lambda x: x.sharding, program.placement.abstract_batch())
    micro = [jax.device_put(b, shardings) for b in micro]
    order = program.steering.decide(program.steering.start(), 0).inputs

    def update() -> float:
        nonlocal state
        for b in micro:
            state, metrics = program.train_step(state, b, order)
        return float(metrics["loss"]) / float(metrics["weight"])

    return update, size


def make_rival(config: Config, batch: BatchArithmetic, compiled: bool) -> tuple[Callable, int]:
    """A function that makes one update of nanoGPT's model and returns its loss, and the number of its parameters.

    The update is that of nanoGPT's train.py. `compiled` says whether torch.compile compiles the model.
    """
    import torch
    from nanogpt import GPT

    m, vocab, length = config.model, config.tokenizer.vocab_size, batch.seq_len
    # SwiGLU has three matrices where GELU has two.
    hidden = m.mlp_dim * 3 // 2 if m.activation == "swiglu" else m.mlp_dim
    torch.manual_seed(0)
    model, o = GPT(vocab, length, m.num_layers, m.model_dim, m.num_heads, hidden), config.optimizer
    # As in nanoGPT, only matrices have weight decay.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = config.adamw.beta1, config.adamw.beta2
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=betas, fused=True)
    forward, steps = torch.compile(model) if compiled else model, batch.accumulation_steps
    micro = [torch.randint(0, vocab, (batch.micro_batch_size, length + 1)) for _ in range(steps)]

    def update() -> float:
        for tokens in micro:
            loss = forward(tokens[:, :-1], tokens[:, 1:]) / steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() * steps

    return update, sum(p.numel() for p in model.parameters())


def make_side(side: str, shape: str) -> tuple[Callable[[], float], tuple[int, str]]:
    """One side, "ours", "eager" or "compiled", for `take_turns`: a function that measures an update in seconds, and the
    number of parameters with the name of the side."""
    config, derived = load_config(SHAPES[shape])
    if side == "ours":
        keep_freed_memory()
        (update, size), name = make_ours(config, derived), "llmjax"
    else:
        import torch

        (update, size), name = (
            make_rival(config, derived.batch, side == "compiled"),
            f"PyTorch {torch.__version__}",
        )
    for _ in range(WARMUP_UPDATES):
        update()
    return functools.partial(seconds, update), (size, name)


def bench(shape: str, rounds: int, rival: str) -> None:
    """Measures both sides in turn, `rounds` times, and reports tokens per second for a shape of `SHAPES`."""
    ours, other = take_turns([functools.partial(make_side, side, shape) for side in ("ours", rival)], rounds)
    (size, _), (rival_size, rival_name) = ours.facts, other.facts
    mine, theirs = ours.values, other.values
    batch = load_config(SHAPES[shape])[1].batch
    # Times are the inverse of speeds, so this is ours / rival in tokens per second.
    ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    report(
        f"train_{shape}",
        round(batch.tokens_per_update / statistics.median(mine)),
        "tokens/s",
        f"nanoGPT-style {rival_name}, {rival}",
        round(batch.tokens_per_update / statistics.median(theirs)),
        GOAL,
        ratio >= GOAL,
        ratio=round(ratio, 3),
        parameters=size,
        rival_parameters=rival_size,
        batch=batch.describe(),
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["base", "12m"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--rival",
        choices=("eager", "compiled"),
        default="eager",
        help="compiled: by torch.compile, which needs a C++ compiler",
    )
    args = parser.parse_args()
    shapes, rounds = (["smoke"], 1) if args.smoke else (args.shapes, args.rounds)
    for shape in shapes:
        if can_run(f"train_{shape}", "torch", args.smoke):
            bench(shape, rounds, args.rival)


if __name__ == "__main__":
    main()
