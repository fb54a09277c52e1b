"""Finds the documents of a micro-batch whose loss is infinite or NaN, from the loss of every token.

Documents of the same row do not affect each other (`ops/attention/isolation.py`), so the documents with a non-finite
loss are the ones at fault, not their neighbours.
"""

from __future__ import annotations

import numpy as np

from llmjax.data.pipeline import PackedSequences
from llmjax.evaluate.scoring import TokenLosses
from llmjax.types import Params

# The name of a document, and the range of its tokens: the first one, and the one after the last.
Document = tuple[str, int, int]


def documents_not_finite(
    losses: TokenLosses, params: Params, sequences: PackedSequences, first: int, count: int
) -> list[Document]:
    """The documents with a non-finite loss, without dropout, in `count` packed sequences from number `first` on."""
    arrays = sequences.read(np.arange(first, first + count))
    bad_BT = ~np.isfinite(np.asarray(losses(params, arrays)[0])) & (arrays["segments"] > 0)
    found: list[Document] = []
    for row in np.flatnonzero(bad_BT.any(axis=1)):
        documents = sequences.documents(np.array([first + row]))
        found += [documents[segment - 1] for segment in np.unique(arrays["segments"][row][bad_BT[row]])]
    return found
