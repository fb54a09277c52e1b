"""Measures what long sequences cost on a CPU, beside the attention of PyTorch and of jax.

    pip install torch==2.13.0
    JAX_PLATFORMS=cpu python tools/bench_long_cpu.py                                  # a quarter of an hour

attention   milliseconds of one attention layer, forward and backward, in float32 with 4 heads of 32: for one document
            of 2048 tokens, one of 8192 tokens, and 8192 tokens in documents of 512. The rivals are PyTorch's
            scaled_dot_product_attention and `jax.nn.dot_product_attention`, which get the documents as a mask
step        peak memory of a process that makes two updates of a GPT of 2 layers, 128 wide, on one document of 65536
            tokens, interpreter and compiler included. It is compared with the size of the scores of full attention,
            which are not computed
packed      milliseconds per 1000 tokens of an update of that GPT on rows of 32768 tokens in documents of 512. The rival
            is the same number of tokens in rows of 512

Each side runs in a process of its own, and the sides take turns. Values are medians over the rounds, and ratios are the
medians of the ratios of each round. Goals are goals of the ratios. The output has one JSON object in each line. Run it
on an idle machine.
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

# The sizes of attention, and the length of short documents. Choices.
HEADS, HEAD_DIM, DOCUMENT = 4, 32, 512
# The goal of attention's ratio: not slower than the rivals.
ATTENTION_GOAL = 1.0
# The goal of the peak memory of `step`, in GiB.
STEP_GOAL = 3
# The goal of the ratio of `packed`: attention within long rows may add this much to the time of short ones.
PACKED_GOAL = 1.3
# The small GPT, as changes to configs/base.py.
SMALL = {
    "model.num_layers": 2, "compute.accumulation_steps": 1, "optimizer.name": "adamw", "compute.remat": "attention",
    "compute.tile": 4096, "compute.scan_layers": True,
}  # fmt: skip
# Does what is measured.
Work = Callable[[], None]


def columns(rows: int, length: int, document: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions, int32 [rows, length] each, of rows filled with documents of the length `document`."""
    index = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return index // document + 1, index % document


def inputs(length: int) -> list[np.ndarray]:
    """Random queries, keys, values and output gradients, float32 [1, length, HEADS, HEAD_DIM] each."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, length, HEADS, HEAD_DIM), np.float32) for _ in range(4)]


def attention_by_jax(length: int, attend: Callable) -> Work:
    """Forward and backward pass of `attend(q, k, v)`, compiled by jax."""
    q, k, v, dout = inputs(length)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    return lambda: jax.block_until_ready(run(q, k, v, dout))


def attention_ours(length: int, document: int) -> Work:
    """Our blockwise attention."""
    segments, positions = columns(1, length, document)
    attend = make_attend("blockwise", None)
    mask = self_mask(segments, positions)
    return attention_by_jax(length, lambda q, k, v: attend(q, k, v, mask))


def attention_stock(length: int, document: int) -> Work:
    """jax's own attention. It gets a mask only if there are several documents."""
    segments, _ = columns(1, length, document)
    mask = None if document == length else jnp.asarray(segments[:, None, :, None] == segments[:, None, None])
    attend = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=True)
    return attention_by_jax(length, attend)


def attention_torch(length: int, document: int) -> Work:
    """PyTorch's attention. It gets a mask only if there are several documents, and is faster without."""
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
    """An update of the small GPT on rows of `length` tokens in documents of the length `document`."""
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
    """One side for `take_turns`: a function that measures the work of `make(*shape)` in seconds."""
    keep_freed_memory()
    work = make(*shape)
    # The first time compiles. The second time, memory is where it will stay.
    work()
    work()
    return functools.partial(seconds, work), None


def beside(makes: list[tuple[Any, ...]], rounds: int) -> list[list[float]]:
    """The seconds of each round, for each of `makes`, which are (function that makes the work, *its arguments)."""
    return [x.values for x in take_turns([functools.partial(side, *make) for make in makes], rounds)]


def attention(rounds: int, smoke: bool) -> None:
    """Measures attention layers beside those of jax and PyTorch."""
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
            goal = ATTENTION_GOAL
            report(name, value, "ms", rival, rival_value, goal, ratio <= goal, ratio=ratio)


def step(rounds: int, smoke: bool) -> None:
    """Measures the peak memory of updates on one long document. It is the same in every round, so there is none."""
    length, GiB = 512 if smoke else 65536, 2**30
    peak = take_turns([functools.partial(side, update, 1, length, length)], 0)[0].peak
    # float32 scores of all heads of one layer.
    scores, most = HEADS * length**2 * 4, STEP_GOAL * GiB
    rival = "scores of full attention"
    report("step", peak / GiB, "GiB", rival, scores / GiB, most / scores, peak <= most, tokens=length)


def packed(rounds: int, smoke: bool) -> None:
    """Measures updates on short documents in long rows, beside the same documents in short rows."""
    length, document = (512, 128) if smoke else (32768, DOCUMENT)
    shapes = (1, length, document), (length // document, document, document)
    times = beside([(update, *shape) for shape in shapes], rounds)
    ratio = statistics.median(a / b for a, b in zip(*times))
    value, rival_value = (1e6 * statistics.median(x) / length for x in times)
    rival = f"rows of {document}"
    goal = PACKED_GOAL
    report("packed", value, "ms per 1000 tokens", rival, rival_value, goal, ratio <= goal, ratio=ratio)


# The parts of the benchmark, by their names on the command line.
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
