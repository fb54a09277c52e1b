"""Copying at a distance: a model reads random tokens twice, and is scored on the second copy.

Nothing but the context can tell the second copy, and attention heads that look for the earlier occurrence of the
current token (induction heads: Olsson et al. 2022) tell all of it but its first token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmjax.data.packing.packing import hash_integers
from llmjax.errors import UserError
from llmjax.evaluate.probes.fillers import fillers
from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

SHORTEST = 4  # tokens: two copies of two
# Tokens to read for each length, in no fewer and no more sequences than the two numbers below say.
TOKENS = 2**15
SEQUENCES = 8, 64


def make_copy(text: Text, lengths: Sequence[int]) -> Probe:
    """Loss and accuracy on the second copy, by the distance D = length // 2 of the two copies.

    The model reads bos, D random tokens and these again without anything between. They are drawn evenly from the ids
    that occur in the held-out text, without repetition as long as there are enough. The D - 1 targets after the second
    copy's first token count; `first_loss` is the loss of the same targets in the first copy, where they cannot be
    known, `chance` the accuracy of guessing.
    """
    distances = sorted({length // 2 for length in lengths if length >= SHORTEST})
    if not distances:
        raise UserError(
            f"evaluate.probe_lengths={tuple(lengths)} has no length of {SHORTEST} tokens or more, which the probe copy "
            "needs; give longer ones"
        )
    pool = np.unique(np.concatenate(list(fillers(text, max(lengths)).values())))

    def pieces() -> Iterator[Piece]:
        least, most = SEQUENCES
        for i, D in enumerate(distances):
            labels = np.full(2 * D, -1, np.int32)
            labels[1:D], labels[D + 1 :] = 2 * i, 2 * i + 1
            for number in range(min(max(TOKENS // (2 * D), least), most)):
                drawn = draw(pool, D, most * i + number)
                yield Piece(np.concatenate([[text.tokenizer.bos_id], drawn, drawn]), labels)

    def summarize(sums: Sums) -> dict[str, Any]:
        first, second = sums.at(slice(0, None, 2)), sums.at(slice(1, None, 2))
        return {
            "distance": distances,
            "loss": second.losses(),
            "accuracy": second.accuracies(),
            "first_loss": first.losses(),
            "chance": 1 / len(pool),
        }

    return Probe(pieces, 2 * len(distances), summarize)


def draw(pool: np.ndarray, count: int, key: int) -> np.ndarray:
    """`count` of `pool` in random order; after all of them, all of them again in another."""
    rounds = -(-count // len(pool))
    orders = [np.argsort(hash_integers(np.arange(len(pool)), (key << 20) + i)) for i in range(rounds)]
    return pool[np.concatenate(orders)[:count]]
