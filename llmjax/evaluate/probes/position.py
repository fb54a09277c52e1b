"""Held-out loss by position: how well a target is predicted, by how much of its document the model has read.

A curve that falls and then lies flat says how far back the model looks (Kaplan et al. 2020, appendix D.5). The targets
of different positions are different text, though; `context` asks about the same targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

ROWS = 1024  # packed sequences whose pieces are listed at a time


def make_position(text: Text, lengths: Sequence[int]) -> Probe:
    """Every held-out target once, under the bucket [0, 1), [1, 2), [2, 4), ... of its position.

    A document longer than seq_len is read in pieces, as in training and evaluation, and positions count from 0 in each:
    they say how much the model has before it. The buckets' sums add up to the sums of the held-out loss. `lengths` are
    of no use here: they are those of evaluation.
    """
    first = np.array([0, *(2**i for i in range((text.seq_len - 1).bit_length()))])
    labels = np.searchsorted(first, np.arange(text.seq_len), side="right").astype(np.int32) - 1

    def pieces() -> Iterable[Piece]:
        num_rows = text.sequences.plan.num_rows
        for start in range(0, num_rows, ROWS):
            rows = np.arange(start, min(start + ROWS, num_rows))
            for doc, begin, end in text.sequences.spans(rows):
                yield Piece(text.tokens(doc, begin, end), labels[: end - begin - 1])

    def summarize(sums: Sums) -> dict[str, Any]:
        used = np.flatnonzero(sums.count)
        sums = sums.at(used)
        return {
            "from": first[used].tolist(),
            "loss": sums.losses(),
            "accuracy": sums.accuracies(),
            "targets": sums.count.astype(int).tolist(),
        }

    return Probe(pieces, len(first), summarize)
