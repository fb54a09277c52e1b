"""How a run of tokens is cut into chunks of equal size, for loops that take one chunk at a time.

A length with a good divisor is cut by it. A length without one, such as a prime, is filled up: a chunk of a single
token would make a loop of as many turns as there are tokens. The filling is less than one token for each chunk; it
consists of zeros, so its weight and its segment are 0, and what is computed for it is cut off again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chunks:
    """`tokens` things in chunks of `size`, of which the last may have to be filled up."""

    tokens: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.tokens // self.size)

    @property
    def padded(self) -> int:
        """How many things there are with the filling."""
        return self.count * self.size

    def fill(self, x: jax.Array, axis: int) -> jax.Array:
        """x with `padded` entries along `axis`: zeros are added to numbers, and to random keys copies of the first."""
        missing = self.padded - self.tokens
        if not missing:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
            first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
            return jnp.concatenate([x, jnp.broadcast_to(first, shape)], axis)
        return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

    def split(self, x: jax.Array, axis: int) -> jax.Array:
        """x filled up, with (count, size) in the place of `axis`."""
        return self.fill(x, axis).reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :])

    def join(self, x: jax.Array, axis: int) -> jax.Array:
        """What `split` made, put together again: its dimensions `axis` and the next become one, without the filling."""
        x = x.reshape(*x.shape[:axis], self.padded, *x.shape[axis + 2 :])
        return x if self.padded == self.tokens else jax.lax.slice_in_dim(x, 0, self.tokens, axis=axis)


def cut(tokens: int, limit: int) -> Chunks:
    """Chunks of at most `limit`, which is taken to be at least 1.

    The largest divisor of `tokens` is the size, unless chunks that need filling would be more than twice as large.
    """
    limit = min(max(limit, 1), tokens)
    even = -(-tokens // -(-tokens // limit))
    divisor = next(size for size in range(limit, 0, -1) if tokens % size == 0)
    return Chunks(tokens, divisor if 2 * divisor >= even else even)
