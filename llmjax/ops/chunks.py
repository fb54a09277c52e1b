"""Cuts a sequence of tokens into chunks of equal size, for loops that take one chunk at a time.

If the number of tokens has a large enough divisor, the divisor is the chunk size. Otherwise (a prime, for example)
the last chunk is padded, because chunks of a single token would make the loop as long as the sequence. Padding adds
less than one token per chunk. It consists of zeros, so that its loss weight and its segment are 0, and `join` removes
its results.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chunks:
    """`tokens` entries in chunks of `size`. The last chunk may be padded."""

    tokens: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.tokens // self.size)

    @property
    def padded(self) -> int:
        """The number of entries with padding."""
        return self.count * self.size

    def fill(self, x: jax.Array, axis: int) -> jax.Array:
        """x padded to `padded` entries along `axis`: numbers with zeros, random keys with copies of the first key."""
        missing = self.padded - self.tokens
        if not missing:
            return x
        # `jnp.pad` does not accept random keys. Any key will do, because the results of the padding are cut off.
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
            first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
            return jnp.concatenate([x, jnp.broadcast_to(first, shape)], axis)
        return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

    def split(self, x: jax.Array, axis: int) -> jax.Array:
        """x padded, with the dimension `axis` replaced by the two dimensions (count, size)."""
        return self.fill(x, axis).reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :])

    def join(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `split`: merges the dimensions `axis` and `axis` + 1 into one and removes the padding."""
        x = x.reshape(*x.shape[:axis], self.padded, *x.shape[axis + 2 :])
        return x if self.padded == self.tokens else jax.lax.slice_in_dim(x, 0, self.tokens, axis=axis)


def cut(tokens: int, limit: int) -> Chunks:
    """Chunks of at most `limit` tokens. A `limit` below 1 counts as 1.

    The size is the largest divisor of `tokens` within the limit, unless padded chunks could be more than twice as
    large.
    """
    limit = min(max(limit, 1), tokens)
    # The smallest chunk size that needs no more chunks than `limit` does: it pads the least.
    even = -(-tokens // -(-tokens // limit))
    divisor = largest_divisor(tokens, limit)
    return Chunks(tokens, divisor if 2 * divisor >= even else even)


def largest_divisor(n: int, limit: int, multiple_of: int = 1) -> int:
    """The largest divisor of `n` that is at most `limit` and a multiple of `multiple_of`; 0 if there is none."""
    sizes = range(limit - limit % multiple_of, 0, -multiple_of)
    return next((size for size in sizes if n % size == 0), 0)
