"""From the seed in a config to a random key."""

from __future__ import annotations

import jax
import numpy as np

WORD = 32  # bits of a seed that `jax.random.key` looks at where 64-bit types are off


def make_key(seed: int) -> jax.Array:
    """The random key of a seed from 0 to 2^63 - 1, another one for each.

    `jax.random.key` drops all but the low 32 bits in silence. Here the high ones are folded in, if there are any, so
    that a seed below 2^32 has the key that `jax.random.key` gives it.
    """
    high, low = divmod(seed, 2**WORD)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key
