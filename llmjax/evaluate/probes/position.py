"""Held-out loss by position: how well a target is predicted, by how many tokens of its document come before it.

A curve that falls and then stays flat shows how far back the model looks (Kaplan et al. 2020, appendix D.5). But
different positions have different targets; the probe `context` compares the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

# The number of packed sequences whose pieces are listed at a time. A choice.
ROWS = 1024


def make_position(text: Text, lengths: Sequence[int]) -> Probe:
    """Scores every held-out target once, in the bucket [0, 1), [1, 2), [2, 4), ... of its position.

    A document longer than seq_len is read in pieces, as in training and evaluation, and positions count from 0 in
    each piece: they say how many tokens come before the target. The sums of the buckets add up to the held-out loss.
    `lengths` is not used.
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
