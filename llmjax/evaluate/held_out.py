"""Exact sums over every held-out target, and what gzip and xz make of the same text."""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import math
from collections.abc import Callable, Iterable
from typing import Annotated

import jax

from llmjax.errors import UserError
from llmjax.ranges import COUNT, Range, Unset, check_ranges
from llmjax.tasks.contract import Totals
from llmjax.types import Batch, LossSums, Params

# Batches of which results are not there yet.
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The `evaluate` section of the config.

    every          updates between evaluations on the held-out documents; 0 = only at the end
    batch_size     sequences per step; 0 = the micro-batch size of training
    probes         whether the long context is used, asked at the end and by --mode=evaluate; names of
                   `probes.PROBES`
    probe_lengths  of their texts, in tokens; () = 1, 16, 32, 64, ... up to data.seq_len
    """

    every: Annotated[int, Range(1, COUNT, "only at the end")]
    batch_size: Annotated[int, Range(1, 2**24, "the micro-batch size")]
    probes: Annotated[tuple[str, ...], Unset(())]
    probe_lengths: Annotated[tuple[int, ...], Range(1, 2**30), Unset(())]

    def __post_init__(self):
        check_ranges("evaluate", self)


def evaluate(
    eval_step: Callable[[Params, Batch], LossSums], params: Params, batches: Iterable[Batch], num_bytes: int
) -> Totals:
    """The sums over `batches`, which hold every held-out target exactly once; `num_bytes` of UTF-8 text is theirs.

    What they mean is said by the task.
    """
    sums: list[LossSums] = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        if len(sums) > IN_FLIGHT:  # the device always has work, but whoever gives the batches can end it soon
            jax.block_until_ready(sums[-1 - IN_FLIGHT])
    fetched: list[LossSums] = jax.device_get(sums)
    weight = math.fsum(float(s.weight) for s in fetched)
    if not weight:
        raise UserError("the held-out set has no targets; raise data.held_out_fraction or add documents")
    metrics = {name: math.fsum(float(s.metrics[name]) for s in fetched) for name in fetched[0].metrics}
    return Totals(math.fsum(float(s.loss) for s in fetched), weight, metrics, num_bytes)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of gzip and xz at their strongest, over the whole of `text` in one piece."""
    size = max(len(text), 1)
    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / size,
        "xz": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / size,
    }
