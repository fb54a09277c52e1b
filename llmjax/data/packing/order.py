"""Orders that are computed and never drawn: integer hashes, a permutation of rows, and a fast stable sort.

No function here uses a library's random generator, whose output may change between versions. The same arguments
therefore give the same order with every version of numpy and on every machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np


def hash_integers(values: np.ndarray | Sequence[int], key: int) -> np.ndarray:
    """Hashes integers under an integer key: uint64, of the shape of `values`.

    For a fixed key different values have different hashes, because each line below can be undone. The function is the
    finaliser of splitmix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators").
    """
    # The constants are those of splitmix64. Products wrap around at 2**64, which the algorithm relies on.
    x = np.array(values, np.uint64) ^ np.uint64((key + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Maps `indices` [n] by a permutation of range(size) that (seed, epoch) selects: int64 [n].

    Any index can be mapped without computing the others, and no table is stored. The permutation is a Feistel network
    on a square grid with cycle walking (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    # The network permutes the numbers below side**2. This is the smallest square that holds range(size).
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = _round_keys(seed, epoch)
    images = _feistel(np.asarray(indices).astype(np.uint64), side, keys)
    # Cycle walking: an image outside range(size) is mapped again until it lies inside. The result is still one to one.
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], side, keys)
    return images.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """The keys of the four rounds of the Feistel network, different in every epoch."""
    return tuple(hash_integers(hash_integers(np.arange(4) + 4 * epoch, 0), seed).tolist())


def _feistel(values: np.ndarray, side: np.uint64, keys: tuple[int, ...]) -> np.ndarray:
    """Permutes the numbers below side**2: `values` is uint64 [n], and one round is applied per key."""
    left, right = np.divmod(values, side)
    for key in keys:
        # A round is one to one whatever the hash: subtracting the same hash from the new right half undoes it.
        left, right = right, (left + hash_integers(right, key) % side) % side
    return left * side + right


def stable_argsort(values: np.ndarray) -> np.ndarray:
    """Returns np.argsort(values, kind="stable") for non-negative integers [n], but in less time."""
    # Radix sort with digits of 16 bits, the lowest first: numpy sorts uint16 by counting instead of comparing.
    order = np.argsort(values.astype(np.uint16), kind="stable")
    for shift in range(16, int(values.max(initial=0)).bit_length(), 16):
        order = order[np.argsort((values[order] >> shift).astype(np.uint16), kind="stable")]
    return order
