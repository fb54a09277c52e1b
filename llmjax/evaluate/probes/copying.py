"""Copying at a distance: the model reads random tokens twice and is scored on the second copy.

The second copy can be predicted only from the context. Attention heads that find the earlier occurrence of the
current token (induction heads: Olsson et al. 2022) predict all of it except for its first token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmjax.data.packing.order import hash_integers
from llmjax.errors import UserError
from llmjax.evaluate.probes.fillers import fillers
from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

# The shortest text: two copies of two tokens.
SHORTEST = 4
# For each length, about TOKENS tokens are read, in at least and at most the numbers of texts in SEQUENCES. Choices.
TOKENS = 2**15
SEQUENCES = 8, 64


def make_copy(text: Text, lengths: Sequence[int]) -> Probe:
    """Loss and accuracy on the second copy, by the distance D = length // 2 between the two copies.

    The model reads bos and twice the same D random tokens. They are drawn uniformly from the ids in the held-out
    text, without repetition while there are enough. The D - 1 targets after the first token of the second copy count.
    `first_loss` is the loss of the same targets in the first copy, where they are unpredictable, and `chance` is the
    accuracy of guessing.
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
            # Even labels belong to the first copy, odd labels to the second.
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
    """`count` entries of `pool` in random order. If there are too few, all of them follow again in another order."""
    rounds = -(-count // len(pool))
    # Sorting by hashes is a random permutation that is the same in every run.
    orders = [np.argsort(hash_integers(np.arange(len(pool)), (key << 20) + i)) for i in range(rounds)]
    return pool[np.concatenate(orders)[:count]]
