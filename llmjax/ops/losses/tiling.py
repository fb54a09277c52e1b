"""Sizes of the chunks of tokens and the blocks of vocabulary ids that the loss in `cross_entropy.py` loops over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.ops import chunks
from llmjax.ops.chunks import Chunks

# Blocks are multiples of 16 ids: a TPU stores a bfloat16 array in tiles of 16 rows.
TILE = 16


@dataclasses.dataclass(frozen=True)
class Chunking:
    """The sizes and the layout of the loop over logits. They change time and memory, not the sums.

    chunk_tokens  the most tokens of a chunk, per shard of the tokens
    chunk_bytes   the most bytes of the softmax numerators of a chunk; a chunk has fewer tokens if they would take
                  more
    block_bytes   the most bytes of the float32 logits of one block of ids
    ids_first     the layout of arrays over tokens and ids. If true, ids are the rows, so that a block of ids is
                  contiguous; otherwise tokens are the rows
    cast_once     if true, the weights are copied once in the dtype of the hidden states; otherwise each read casts
                  them
    wide          the gradient of the hidden states is computed as float32 and then rounded, see `wide_product`
    """

    chunk_tokens: int
    chunk_bytes: int
    block_bytes: int
    ids_first: bool
    cast_once: bool
    wide: bool = False


# At 1024 tokens per chunk, a matrix product on a TPU takes longer than its memory traffic, reads of float32 weights
# included. Blocks of 22 MiB, with weights cast at each read, brought the
# temporaries down from 1.3 GiB to 300 MiB.
TPU = Chunking(chunk_tokens=1024, chunk_bytes=2**28, block_bytes=22 * 2**20, ids_first=True, cast_once=False)
# With tokens as rows, XLA on CPU transposes only small operands, and with a single block it copies none of them. The
# sizes are choices.
OTHERS = Chunking(chunk_tokens=512, chunk_bytes=2**28, block_bytes=2**28, ids_first=False, cast_once=True)
# The matrix unit of a CPU multiplies bfloat16 numbers only to float32 results.
CPU = dataclasses.replace(OTHERS, wide=True)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How tokens and ids are cut. X, Y and Z are the numbers of shards of B, T and V. Shards stay separate until the
    end.

    chunks  the chunks of the tokens of one shard; C is the size of a chunk
    ids     the number of ids of one shard, which are processed `block` at a time
    order   the dimensions of an array over tokens and ids, such as "XYCZV"; V always comes right after Z
    """

    X: int
    Y: int
    Z: int
    chunks: Chunks
    ids: int
    block: int
    order: str

    @property
    def C(self) -> int:
        """The number of tokens in a chunk."""
        return self.chunks.size

    @property
    def z(self) -> int:
        """The index of dimension Z in `order`; the index of V is z + 1."""
        return self.order.index("Z")

    @property
    def states(self) -> str:
        """The dimensions of an array that has one entry per token and shard of ids: `order` without V."""
        return self.order.replace("V", "")

    @property
    def num_blocks(self) -> int:
        return -(-self.ids // self.block)

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [X, Y, chunks, C, ...]. Each chunk consists of tokens of one shard only, so the loop needs
        no communication."""
        B, T, *more = x.shape
        # [B, T] -> [X, B/X, Y, T/Y] -> [X, Y, B/X, T/Y] -> [X, Y, tokens of a shard].
        x = x.reshape(self.X, B // self.X, self.Y, T // self.Y, *more).swapaxes(1, 2)
        return self.chunks.split(x.reshape(self.X, self.Y, self.chunks.tokens, *more), 2)

    def join(self, x: jax.Array, B: int, T: int) -> jax.Array:
        """The inverse of `split`: [X, Y, chunks, C, ...] -> [B, T, ...]."""
        x = self.chunks.join(x, 2)
        x = x.reshape(self.X, self.Y, B // self.X, T // self.Y, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(B, T, *x.shape[4:])

    def zeros(self, dims: str, dtype: Any = jnp.float32, **sizes: int) -> jax.Array:
        """Zeros of the named dimensions. `sizes` overrides or adds sizes of dimensions."""
        return jnp.zeros(self._shape(dims, **sizes), dtype)

    def _shape(self, dims: str, **sizes: int) -> tuple[int, ...]:
        sizes = {"X": self.X, "Y": self.Y, "Z": self.Z, "C": self.C, "V": self.ids, **sizes}
        return tuple(sizes[dim] for dim in dims)

    def by_shard(self, x_XYC: jax.Array) -> jax.Array:
        """x_XYC with a dimension Z of size 1, to broadcast over shards of ids."""
        return jnp.expand_dims(x_XYC, self.z)

    def by_id(self, x: jax.Array) -> jax.Array:
        """x with a dimension V of size 1, to broadcast over ids."""
        return jnp.expand_dims(x, self.z + 1)

    def is_target(self, targets_XYC: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        """bool, true where one of the `size` ids from `start` on (in each shard of ids) is the target of the token.

        The target logit is the sum of the logits selected by this mask, which has one term. A lookup by index would
        make XLA's partitioner abort within `shard_map`.
        """
        shape = self._shape(self.order, V=size)
        shard, place = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (self.z, self.z + 1))
        return shard * self.ids + start + place == self.by_id(self.by_shard(targets_XYC))

    def over_blocks(self, body: Callable, carry: Any) -> Any:
        """Calls `carry = body(block number, first id, number of ids, carry)` for each block of ids and returns the
        last carry."""
        count, rest = divmod(self.ids, self.block)
        # A single block needs no loop. A last, smaller block comes after the loop, because shapes in a loop are
        # fixed.
        if count == 1:
            carry = body(0, 0, self.block, carry)
        else:
            carry = jax.lax.fori_loop(0, count, lambda i, c: body(i, i * self.block, self.block, c), carry)
        return body(count, count * self.block, rest, carry) if rest else carry


def make_tiling(
    chunking: Chunking, shards: tuple[int, int, int], hidden_BTD: jax.Array, w_VD: jax.Array
) -> Tiling:
    """The sizes of chunks and blocks for these arrays. `shards` are the numbers of shards of B, T and V."""
    (B, T, _), V = hidden_BTD.shape, w_VD.shape[0]
    # Numbers of shards that do not divide a dimension are reduced to ones that do; that costs communication only.
    X, Y, Z = (math.gcd(count, size) for count, size in zip(shards, (B, T, V), strict=True))
    tokens, ids = B * T // (X * Y), V // Z
    fitting = chunking.chunk_bytes // (ids * hidden_BTD.dtype.itemsize)
    parts = chunks.cut(tokens, min(chunking.chunk_tokens, fitting))
    block = max(1, min(chunking.block_bytes // (4 * parts.size), ids))
    # Blocks are whole tiles. If a divisor of `ids` is more than half as large as the limit, it is the block size, so
    # that all blocks are equal.
    if block < ids:
        alike = chunks.largest_divisor(ids, block, multiple_of=TILE)
        block = alike if 2 * alike > block else block - block % TILE or block
    return Tiling(X, Y, Z, parts, ids, block, "ZVXYC" if chunking.ids_first else "XYCZV")
