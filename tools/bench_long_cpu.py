"""What long sequences cost on a CPU, beside PyTorch and jax's own attention.

    pip install torch==2.13.0
    JAX_PLATFORMS=cpu python tools/bench_long_cpu.py                                  # a quarter of an hour

attention   milliseconds of one attention layer, forward and backward, float32, 4 heads of 32: one document of 2048 and
            of 8192 tokens, and 8192 tokens in documents of 512. Against PyTorch's scaled_dot_product_attention and
            `jax.nn.dot_product_attention`, which are given the documents as a mask
step        peak memory of a process that makes two updates of a GPT of 2 layers, 128 wide, on one document of 65536
            tokens, interpreter and compiler included. Against the scores of full attention, which are not computed
packed      milliseconds per 1000 tokens of an update of that GPT on rows of 32768 tokens in documents of 512, against
            as many tokens in rows of 512

Each side has a process of its own, and they take turns; values are medians over the rounds, ratios the medians of the
rounds' ratios; goals are goals of the ratios. One JSON object a line. Run it on an idle machine.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_train import load_config
from lines import can_run, make_parser, report
from turns import seconds, take_turns

from llmjax.build.program import make_program
from llmjax.ops.attention.mask import self_mask
from llmjax.ops.attention.sequence_attention import make_attend
from llmjax.parallel.host_memory import keep_freed_memory
from llmjax.types import Batch

HEADS, HEAD_DIM, DOCUMENT = 4, 32, 512
SMALL = {  # changes to configs/base.py
    "model.num_layers": 2, "compute.accumulation_steps": 1, "optimizer.name": "adamw", "compute.remat": "attention",
    "compute.tile": 4096, "compute.scan_layers": True,
}  # fmt: skip
Work = Callable[[], None]


def columns(rows: int, length: int, document: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of rows filled with documents of one length."""
    index = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return index // document + 1, index % document


def inputs(length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, length, HEADS, HEAD_DIM), np.float32) for _ in range(4)]


def attention_by_jax(length: int, attend: Callable) -> Work:
    q, k, v, dout = inputs(length)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    return lambda: jax.block_until_ready(run(q, k, v, dout))


def attention_ours(length: int, document: int) -> Work:
    segments, positions = columns(1, length, document)
    attend = make_attend("blockwise", None)
    mask = self_mask(segments, positions)
    return attention_by_jax(length, lambda q, k, v: attend(q, k, v, mask))


def attention_stock(length: int, document: int) -> Work:
    segments, _ = columns(1, length, document)
    mask = None if document == length else jnp.asarray(segments[:, None, :, None] == segments[:, None, None])
    attend = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=True)
    return attention_by_jax(length, attend)


def attention_torch(length: int, document: int) -> Work:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v, dout = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in inputs(length))
    for x in (q, k, v):
        x.requires_grad_()
    segments = torch.from_numpy(columns(1, length, document)[0])
    mask = (segments[:, None, :, None] == segments[:, None, None]).tril()
    how = {"is_causal": True} if document == length else {"attn_mask": mask}

    def run() -> None:
        out = scaled_dot_product_attention(q, k, v, **how)
        torch.autograd.grad(out, (q, k, v), dout)

    return run


def update(rows: int, length: int, document: int) -> Work:
    """Updates of the small GPT."""
    changes = {**SMALL, "data.seq_len": length, "train.tokens_per_update": rows * length}
    config, derived = load_config(changes)
    vocab = config.tokenizer.vocab_size
    program = make_program(config, derived, vocab)
    state = program.init()
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length + 1), np.int32)
    weights, index = np.ones((rows, length), np.float32), np.arange(rows, dtype=np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, *columns(rows, length, document), index)
    batch = jax.device_put(batch, jax.tree.map(lambda x: x.sharding, program.placement.abstract_batch()))
    order = program.steering.decide(program.steering.start(), 0).inputs

    def run() -> None:
        nonlocal state
        state, _ = program.train_step(state, batch, order)
        jax.block_until_ready(state)

    return run


def side(make: Callable[..., Work], *shape: int) -> tuple[Callable[[], float], None]:
    """The seconds that the work takes."""
    keep_freed_memory()
    work = make(*shape)
    work()
    work()
    return functools.partial(seconds, work), None


def beside(makes: list[tuple[Any, ...]], rounds: int) -> list[list[float]]:
    """Seconds of each round, of each maker with its shape."""
    return [x.values for x in take_turns([functools.partial(side, *make) for make in makes], rounds)]


def attention(rounds: int, smoke: bool) -> None:
    makes = {"ours": attention_ours, "jax.nn.dot_product_attention": attention_stock}
    if can_run("attention beside PyTorch", "torch", smoke):
        makes["PyTorch scaled_dot_product_attention"] = attention_torch
    shapes = ((2048, 2048), (8192, 8192), (8192, DOCUMENT))
    for length, document in ((256, 64),) if smoke else shapes:
        times = beside([(make, length, document) for make in makes.values()], rounds)
        value, *rivals = (1e3 * statistics.median(side) for side in times)
        for rival, rival_value, theirs in zip(list(makes)[1:], rivals, times[1:]):
            ratio = statistics.median(a / b for a, b in zip(times[0], theirs))
            name = f"attention_{length}_in_{document}"
            report(name, value, "ms", rival, rival_value, 1.0, ratio <= 1.0, ratio=ratio)


def step(rounds: int, smoke: bool) -> None:
    length, GiB = 512 if smoke else 65536, 2**30
    peak = take_turns([functools.partial(side, update, 1, length, length)], 0)[0].peak
    scores, most = HEADS * length**2 * 4, 3 * GiB
    rival = "scores of full attention"
    report("step", peak / GiB, "GiB", rival, scores / GiB, most / scores, peak <= most, tokens=length)


def packed(rounds: int, smoke: bool) -> None:
    length, document = (512, 128) if smoke else (32768, DOCUMENT)
    shapes = (1, length, document), (length // document, document, document)
    times = beside([(update, *shape) for shape in shapes], rounds)
    ratio = statistics.median(a / b for a, b in zip(*times))
    value, rival_value = (1e6 * statistics.median(x) / length for x in times)
    rival = f"rows of {document}"
    report("packed", value, "ms per 1000 tokens", rival, rival_value, 1.3, ratio <= 1.3, ratio=ratio)


FIGURES = {"attention": attention, "step": step, "packed": packed}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    for name in args.figures:
        FIGURES[name](1 if args.smoke else args.rounds, args.smoke)


if __name__ == "__main__":
    main()
