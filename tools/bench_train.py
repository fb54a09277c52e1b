"""Measures how many tokens per second our base model trains on, beside two PyTorch models of the same size.

    pip install torch==2.13.0
    python tools/bench_train.py
    python tools/bench_train.py --shapes gpt2_124m --dtypes bfloat16 --ways compiled

Ours is the training step of `configs/base.py` with another optimizer, on packed documents: RoPE, QK-norm, SwiGLU,
segments in the attention mask, exact sums. The rivals are two. `nanogpt` is the model of nanoGPT (`nanogpt.py`), whose
feed-forward layer is so wide that it has the same number of weights. `same` has our very architecture (`llama.py`).
All have the same layers, width, heads, vocabulary and tokens, and AdamW, which is fused in PyTorch, with clipping. In
bfloat16, the rivals run under `torch.autocast`.

Each side runs in a process of its own, and all take turns. Values are medians over the rounds, and a ratio is the
median of the ratios of each round. The output has one JSON object in each line. Run it on an idle machine.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import runpy
import statistics
from collections.abc import Callable, Sequence
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
# The goals of the ratio ours / rival. In bfloat16 the goal holds where the processor multiplies bfloat16 matrices.
GOALS = {
    "float32": {"nanogpt": 1.0, "same": 1.2},
    "bfloat16": {"nanogpt": 1.2, "same": 1.2},
}
# Changes to configs/base.py that both sides have.
ALIKE = {"optimizer.name": "adamw", "compute.accumulation_steps": 1}
# Updates before the first one that is measured. A choice: the first compiles, and memory is allocated in the next.
WARMUP_UPDATES = 3
# The shapes that can be measured, as changes to configs/base.py, by their numbers of parameters. gpt2_124m has the size
# of GPT-2, not its architecture.
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
    "50m": {
        **ALIKE,
        "train.tokens_per_update": 2 * 512,
        "model.num_layers": 8,
        "model.model_dim": 640,
        "transformer.num_heads": 10,
        "tokenizer.vocab_size": 16384,
    },
    "gpt2_124m": {
        **ALIKE,
        "train.tokens_per_update": 1024,
        "data.seq_len": 1024,
        "model.num_layers": 12,
        "model.model_dim": 768,
        "transformer.num_heads": 12,
        "tokenizer.vocab_size": 50304,
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

# Updates in a turn.
UPDATES = {"gpt2_124m": 2}


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


def make_model(rival: str, config: Config, length: int) -> Any:
    """The model of a rival, "nanogpt" or "same", for sequences of `length` tokens."""
    import llama
    import nanogpt

    m, t = config.model, config.families["transformer"]
    sizes = config.tokenizer.vocab_size, length, m.num_layers, m.model_dim, t.num_heads
    if rival == "nanogpt":
        # SwiGLU has three matrices where GELU has two.
        return nanogpt.GPT(*sizes, t.mlp_dim * 3 // 2 if t.activation == "swiglu" else t.mlp_dim)
    if rival == "same":
        return llama.Llama(*sizes, t.mlp_dim, theta=t.rope_theta, eps=t.norm_eps)
    raise ValueError(f"rival={rival!r} is none of nanogpt and same")


def make_rival(
    rival: str, config: Config, batch: BatchArithmetic, compiled: bool
) -> tuple[Callable[[], float], int]:
    """A function that makes one update of a PyTorch model and returns its loss, and the number of its parameters.

    The update is that of nanoGPT's train.py. `compiled` says whether torch.compile compiles the model.
    """
    import torch

    vocab, length, o = config.tokenizer.vocab_size, batch.seq_len, config.optimizer
    torch.manual_seed(0)
    model = make_model(rival, config, length)
    # As in nanoGPT, only matrices have weight decay.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = config.adamw.beta1, config.adamw.beta2
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=betas, fused=True)
    forward, steps = torch.compile(model) if compiled else model, batch.accumulation_steps
    micro = [torch.randint(0, vocab, (batch.micro_batch_size, length + 1)) for _ in range(steps)]
    in_bfloat16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.model.dtype == "bfloat16")

    def update() -> float:
        for tokens in micro:
            with in_bfloat16:
                loss = forward(tokens[:, :-1], tokens[:, 1:]) / steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() * steps

    return update, sum(p.numel() for p in model.parameters())


def make_side(side: str, shape: str, dtype: str, way: str) -> tuple[Callable[[], float], tuple[int, str]]:
    """One side, "ours" or a rival, for `take_turns`: a function that measures the updates of a turn in seconds, and the
    number of parameters with the name of the side."""
    config, derived = load_config(SHAPES[shape] | {"model.dtype": dtype})
    if side == "ours":
        keep_freed_memory()
        (update, size), name = make_ours(config, derived), "llmjax"
    else:
        import torch

        update, size = make_rival(side, config, derived.batch, way == "compiled")
        name = f"{side} in PyTorch {torch.__version__}, {way}"
    for _ in range(WARMUP_UPDATES):
        update()

    def turn() -> None:
        for _ in range(UPDATES.get(shape, 1)):
            update()

    return functools.partial(seconds, turn), (size, name)


def bench(shape: str, dtype: str, rivals: Sequence[str], way: str, rounds: int) -> None:
    """Measures all sides in turn, `rounds` times, and reports tokens per second for a shape of `SHAPES`."""
    makes = [functools.partial(make_side, side, shape, dtype, way) for side in ("ours", *rivals)]
    ours, *others = take_turns(makes, rounds)
    batch = load_config(SHAPES[shape])[1].batch
    tokens = batch.tokens_per_update * UPDATES.get(shape, 1)
    for rival, other in zip(rivals, others, strict=True):
        # Times are the inverse of speeds, so this is ours / rival in tokens per second.
        ratio = statistics.median(b / a for a, b in zip(ours.values, other.values, strict=True))
        goal = GOALS[dtype][rival]
        report(
            f"train_{shape}_{dtype}",
            round(tokens / statistics.median(ours.values)),
            "tokens/s",
            other.facts[1],
            round(tokens / statistics.median(other.values)),
            goal,
            ratio >= goal,
            ratio=round(ratio, 3),
            parameters=ours.facts[0],
            rival_parameters=other.facts[0],
            batch=batch.describe(),
            rounds=rounds,
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["base", "12m"])
    parser.add_argument("--dtypes", nargs="+", choices=GOALS, default=["float32"])
    parser.add_argument("--rivals", nargs="+", choices=GOALS["float32"], default=[*GOALS["float32"]])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=("eager", "compiled"),
        default=["eager"],
        help="how the rivals run; compiled: by torch.compile, which needs a C++ compiler",
    )
    args = parser.parse_args()
    shapes, rounds = (["smoke"], 1) if args.smoke else (args.shapes, args.rounds)
    # A smoke run tries both dtypes.
    dtypes = list(GOALS) if args.smoke else args.dtypes
    for shape, dtype, way in itertools.product(shapes, dtypes, args.ways):
        if can_run(f"train_{shape}_{dtype}", "torch", args.smoke):
            bench(shape, dtype, args.rivals, way, rounds)


if __name__ == "__main__":
    main()
