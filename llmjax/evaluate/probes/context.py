"""Held-out loss with shortened context: the same targets, predicted from their last c tokens only, for growing c.

The text is cut anew for each c. A sliding-window mask would answer another question, because over several layers its
reach is a multiple of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

# The sample has TARGETS targets, or SEQUENCES times the longest context if that is more. Choices.
TARGETS = 2**15
SEQUENCES = 8
# At most this many times the longest context is taken from one document, from its beginning. A choice.
OF_A_DOCUMENT = 2


def make_context(text: Text, lengths: Sequence[int]) -> Probe:
    """The loss of the same targets for each context length c in `lengths`.

    A document is read in windows of c tokens that begin every s = max(1, c // 2) tokens. In the first window all
    targets count; in each later window only the last s, which earlier windows did not reach. So every target counts
    once and is predicted from between c - s + 1 and c tokens before it, or from all there are, if there are fewer. A
    window begins at position 0, without an extra bos token. `visible` is the mean number of tokens that targets were
    predicted from. If c is at least as long as the documents, the loss is the plain held-out loss.

    The sample consists of held-out documents, longest first, each cut to 2 x the longest c, until they have 2^15
    targets or 8 x the longest c, whichever is more. Each c reads about twice as many tokens as there are targets.
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
    """(document, number of its first targets) for each document in the sample."""
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
    """(start, stop, first target that counts) of each window over n targets; target i is predicted from tokens up to
    i."""
    # Half of each window is context for the other half: twice the cost of reading once, and at least c / 2 of
    # context.
    stride = max(1, cut // 2)
    yield 0, min(cut, n), 0
    for start in range(stride, n - cut + stride, stride):
        yield start, min(start + cut, n), start + cut - stride


def visible(n: int, cut: int) -> int:
    """The number of tokens that each of the n targets is predicted from, summed over the targets."""
    return sum(
        # Target i is predicted from i + 1 - start tokens: an arithmetic series from the first target that counts to
        # the last.
        (stop - counted) * (counted + 1 - start + stop - start) // 2
        for start, stop, counted in windows(n, cut)
    )
