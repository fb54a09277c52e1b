"""Makes a random key from the seed in a config."""

from __future__ import annotations

import jax
import numpy as np

# The number of seed bits that `jax.random.key` uses while 64-bit types are off.
WORD = 32


def make_key(seed: int) -> jax.Array:
    """A random key for a seed from 0 to 2^63 - 1. Different seeds give different keys.

    `jax.random.key` silently drops all but the low 32 bits. Here the high bits are folded in, if any is set. A seed
    below 2^32 gives the same key as `jax.random.key`.
    """
    high, low = divmod(seed, 2**WORD)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key
