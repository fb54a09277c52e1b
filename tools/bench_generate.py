"""Measures how fast texts are written, beside `transformers` with the same weights, and the time to the first token.

    pip install -e '.[interop]'
    python tools/bench_generate.py

The model has the sizes of SmolLM2-135M and random weights in float32; both sides write greedily from a cache of keys
and values, as many tokens as they are asked for. `decode` is the speed after the first token, all texts together, and
`first` the time from ids to the first token. The rival is `generate` of transformers in PyTorch, as it is by default.

Each side runs in a process of its own, and the two take turns. Values are medians over the rounds, and the ratio is the
median of the ratios of each round. The output has one JSON object in each line. Run it on an idle machine.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from lines import can_run, make_parser, report
from turns import take_turns

# The goal of the speed ours / rival.
GOAL = 1.5
# What config.json says of the model.
SIZES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
SMALL = SIZES | {"vocab_size": 512, "hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 2}
# Texts side by side, and tokens of each prompt.
SHAPES = ((1, 32), (4, 32), (16, 32), (1, 1024), (4, 1024), (16, 1024))
# Tokens that are written after each prompt.
WRITTEN = 32


def make_rival(sizes: dict[str, Any], batch: int, prompt: int, written: int) -> tuple[Callable, str]:
    """A function () -> (seconds to the first token, seconds for all), and the name of the side."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    ids = torch.tensor(prompts(sizes, batch, prompt))

    def write(count: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - started

    def measure() -> tuple[float, float]:
        return write(1), write(written)

    measure()
    return measure, f"transformers {transformers.__version__}, PyTorch {torch.__version__}"


def make_ours(sizes: dict[str, Any], batch: int, prompt: int, written: int) -> tuple[Callable, str]:
    """The same for llmjax, with weights of the same sizes."""
    import jax

    from llmjax.build.program import make_program
    from llmjax.config.imported import imported_config
    from llmjax.config.resolve import resolve_config
    from llmjax.convert.config_keys import architecture_of, read_settings
    from llmjax.generate.generate import make_generator

    config, derived = resolve_config(imported_config(read_settings(architecture_of(sizes), sizes)), 1)
    program = make_program(config, derived, sizes["vocab_size"], jax.devices()[:1])
    params = program.init().params
    # No id ends a text.
    settings = dataclasses.replace(config.generate, max_tokens=written, temperature=0.0)
    generate = make_generator(program.model, settings, eos_id=-1)
    ids = prompts(sizes, batch, prompt)

    def measure() -> tuple[float, float]:
        started, first = time.perf_counter(), 0.0
        count = 0
        for _ in generate(params, ids):
            first = first or time.perf_counter() - started
            count += 1
        assert count == written
        return first, time.perf_counter() - started

    measure()
    return measure, "llmjax"


def prompts(sizes: dict[str, Any], batch: int, prompt: int) -> list[list[int]]:
    """Random prompts, the same for both sides."""
    return np.random.default_rng(0).integers(1, sizes["vocab_size"], (batch, prompt)).tolist()


def bench(sizes: dict[str, Any], batch: int, prompt: int, written: int, rounds: int) -> None:
    """Measures both sides in turn, and reports the speed of decoding and the time to the first token."""
    ours, other = take_turns(
        [functools.partial(make, sizes, batch, prompt, written) for make in (make_ours, make_rival)], rounds
    )
    speeds = [
        [batch * (written - 1) / (whole - first) for first, whole in side.values] for side in (ours, other)
    ]
    firsts = [[first for first, _ in side.values] for side in (ours, other)]
    name = f"{batch}_texts_after_{prompt}"
    ratio = statistics.median(a / b for a, b in zip(*speeds, strict=True))
    a, b = map(statistics.median, speeds)
    report(f"decode_{name}", a, "tokens/s", other.facts, b, GOAL, ratio >= GOAL, ratio=ratio, written=written)
    ratio = statistics.median(a / b for a, b in zip(*firsts, strict=True))
    a, b = map(statistics.median, firsts)
    report(f"first_token_{name}", a, "s", other.facts, b, 1.0, ratio <= 1.0, ratio=ratio)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=sorted({batch for batch, _ in SHAPES}))
    args = parser.parse_args()
    if not can_run("generate", "transformers", args.smoke):
        return
    if args.smoke:
        bench(SMALL, 2, 8, 4, 1)
        return
    for batch, prompt in SHAPES:
        if batch in args.batches:
            bench(SIZES, batch, prompt, WRITTEN, args.rounds)


if __name__ == "__main__":
    main()
