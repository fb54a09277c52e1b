"""Which documents of a micro-batch have a loss that is not finite, found by asking for the loss of every token.

Documents of a row do not touch each other (`ops/attention/apart`): those whose tokens have no finite loss are at fault,
and not their neighbours.
"""

from __future__ import annotations

import numpy as np

from llmjax.data.pipeline import PackedSequences
from llmjax.evaluate.scoring import TokenLosses
from llmjax.types import Params

Document = tuple[str, int, int]  # its name, and which of its tokens: from the first up to the second number


def documents_not_finite(
    losses: TokenLosses, params: Params, sequences: PackedSequences, first: int, count: int
) -> list[Document]:
    """The documents in `count` packed sequences from number `first` on whose loss is not finite, without dropout."""
    arrays = sequences.read(np.arange(first, first + count))
    bad_BT = ~np.isfinite(np.asarray(losses(params, arrays)[0])) & (arrays["segments"] > 0)
    found: list[Document] = []
    for row in np.flatnonzero(bad_BT.any(axis=1)):
        documents = sequences.documents(np.array([first + row]))
        found += [documents[segment - 1] for segment in np.unique(arrays["segments"][row][bad_BT[row]])]
    return found
