"""Evaluation on held-out documents: exact sums over every target, and the compression of the same text by gzip and
xz."""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from llmjax.errors import UserError
from llmjax.ranges import COUNT, Range, Unset, check_ranges
from llmjax.tasks.contract import Totals
from llmjax.types import Batch, LossSums, Params

# The most batches whose results are still being computed. A choice: enough that the device always has work.
IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """The `evaluate` section of the config.

    every          updates between evaluations on the held-out documents; 0 means only at the end
    batch_size     sequences per step; 0 means the micro-batch size of training
    probes         names of `PROBES` that test the use of long context, at the end and with --mode=evaluate
    answer_prefix  what stands between a question and an answer, see `questions.py`
    read_bos       whether questions begin with the bos token, as all texts do that are trained on here. Some models of
                   other programs were trained without
    probe_lengths  text lengths of the probes in tokens; () means 1, 16, 32, 64, ... up to data.seq_len
    """

    every: Annotated[int, Range(1, COUNT, "only at the end")]
    batch_size: Annotated[int, Range(1, 2**24, "the micro-batch size")]
    probes: Annotated[tuple[str, ...], Unset(())]
    probe_lengths: Annotated[tuple[int, ...], Range(1, 2**30), Unset(())]
    answer_prefix: Annotated[str, Unset(" ")]
    read_bos: Annotated[bool, Unset(True)]

    def __post_init__(self):
        check_ranges("evaluate", self)


def evaluate(
    eval_step: Callable[[Params, Batch], LossSums], params: Params, batches: Iterable[Batch], num_bytes: int
) -> Totals:
    """The sums over `batches`, which contain every held-out target exactly once. The task turns them into scores.

    `num_bytes` is the size of the held-out text as UTF-8.
    """
    sums: list[LossSums] = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        # Waiting for an earlier batch bounds the memory, and lets the caller stop soon, without leaving the device
        # idle.
        if len(sums) > IN_FLIGHT:
            jax.block_until_ready(sums[-1 - IN_FLIGHT])
    fetched: list[LossSums] = jax.device_get(sums)
    # Sums on the host are float64 and correctly rounded, so they do not depend on the number of batches.
    weight = math.fsum(float(s.weight) for s in fetched)
    if not weight:
        raise UserError("the held-out set has no targets; raise data.held_out_fraction or add documents")
    metrics = {name: _sum([s.metrics[name] for s in fetched]) for name in fetched[0].metrics}
    return Totals(math.fsum(float(s.loss) for s in fetched), weight, metrics, num_bytes)


def _sum(values: Sequence[Any]) -> Any:
    """The sum of float32 values in float64, as a float or, of arrays, as an array of numpy."""
    if np.ndim(values[0]):
        return np.sum(np.asarray(values, np.float64), axis=0)
    return math.fsum(float(value) for value in values)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte that gzip and xz need at their strongest setting, over the whole `text` in one piece."""
    size = max(len(text), 1)
    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / size,
        "xz": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / size,
    }
