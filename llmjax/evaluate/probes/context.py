"""Held-out loss with the context cut: the same targets, predicted from their last c tokens alone, for growing c.

The text is cut anew for each c. A sliding-window mask would be another question: through several layers its reach is a
multiple of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

TARGETS = 2**15  # in all, or 8 sequences' worth where that is more
SEQUENCES = 8
OF_A_DOCUMENT = 2  # times the longest cut: what is taken of one document, from its beginning


def make_context(text: Text, lengths: Sequence[int]) -> Probe:
    """Loss of the same targets for each cut c of `lengths`.

    The document is read in windows of c tokens that begin every s = max(1, c // 2) tokens. The first window's targets
    all count, of each further window those that the windows before did not reach, its last s: so every target counts
    once, and is predicted from between c - s + 1 and c of the tokens before it, or from all there are where these are
    fewer. A window begins at position 0, without a bos of its own. `visible` is the mean number of tokens that targets
    were really predicted from; with c at least as long as the documents the loss is the plain held-out loss.

    The sample: held-out documents, longest first, each to at most 2 x the longest cut, until they have 2^15 targets or
    8 x the longest cut, whichever is more; each cut then reads about twice as many tokens.
    """
    spans = sample(text, max(lengths))

    def pieces() -> Iterator[Piece]:
        for label, cut in enumerate(lengths):
            for doc, n in spans:
                for start, stop, counted in windows(n, cut):
                    labels = np.full(stop - start, -1, np.int32)
                    labels[counted - start :] = label
                    yield Piece(text.tokens(doc, start, stop + 1), labels)

    def summarize(sums: Sums) -> dict[str, Any]:
        targets = sum(n for _, n in spans)
        return {
            "length": list(lengths),
            "visible": [sum(visible(n, cut) for _, n in spans) / targets for cut in lengths],
            "loss": sums.losses(),
            "accuracy": sums.accuracies(),
            "targets": targets,
            "documents": len(spans),
        }

    return Probe(pieces, len(lengths), summarize)


def sample(text: Text, longest: int) -> list[tuple[int, int]]:
    """(document, how many of its first targets) of the documents that are looked at."""
    predictions, chosen = text.lengths() - 1, []
    left = max(TARGETS, SEQUENCES * longest)
    for i in np.argsort(-predictions, kind="stable"):
        n = int(min(predictions[i], OF_A_DOCUMENT * longest, left))
        if n <= 0:
            break
        chosen.append((int(text.ids[i]), n))
        left -= n
    return chosen


def windows(n: int, cut: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first that counts) of the windows over n targets; target i is predicted from token i and before."""
    stride = max(1, cut // 2)
    yield 0, min(cut, n), 0
    for start in range(stride, n - cut + stride, stride):
        yield start, min(start + cut, n), start + cut - stride


def visible(n: int, cut: int) -> int:
    """Tokens that the n targets are predicted from, summed."""
    return sum(
        (stop - counted) * (counted + 1 - start + stop - start) // 2
        for start, stop, counted in windows(n, cut)
    )
