"""Softmax cross-entropy straight from hidden states and the unembedding, as sums, never holding all logits.

Logits `[B, T, V]` are the largest array of a training step. Here they exist for one chunk of tokens at a
time, and the gradients are formed while they do, in the forward pass, since the gradient of a sum needs
nothing from later (Liger Kernel: Hsu et al. 2024; cut cross-entropy: Wijmans et al. 2024). Nothing of size V
per token is saved or computed twice.

Every chunk reads and writes the whole gradient of the unembedding, so it had better be large, and yet its logits
take memory. Float32 logits therefore exist for one block of ids at a time, and leave behind the numerators of the
softmax in the dtype of the hidden states, over the largest logit so far (online softmax: Milakov and Gimelshein
2018). With the last block the denominator is known, and numerators become gradients where they lie.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.ops import chunks
from llmjax.ops.chunks import Chunks
from llmjax.ops.logits import softcap as cap_logits
from llmjax.types import Head, LossSums

Gradients = tuple[jax.Array, jax.Array, jax.Array | None]  # of hidden_BTD, w_VD and bias_V
Sums = tuple[jax.Array, dict[str, jax.Array]]  # what gradients are of, and the sums of which it consists
TILE = 16  # ids; on a TPU that many rows of a bfloat16 array lie together


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How to go through the logits, and in what memory; the sums are the same.

    chunk_tokens  tokens of a chunk, of each shard, at most
    chunk_bytes   what the numerators of a chunk may take; where they would take more, it has fewer tokens
    block_bytes   what the float32 logits of a block may take
    ids_first     the layout of arrays over tokens and ids: rows are ids, and blocks of them contiguous; else rows
                  are tokens
    cast_once     a copy of the weights is made in the dtype of the hidden states; else they are cast wherever they
                  are read
    """

    chunk_tokens: int
    chunk_bytes: int
    block_bytes: int
    ids_first: bool
    cast_once: bool


# At 1024 tokens a matrix product on a TPU takes longer than the traffic it makes, that of float32 weights included.
TPU = Chunking(chunk_tokens=1024, chunk_bytes=2**28, block_bytes=22 * 2**20, ids_first=True, cast_once=False)
# With rows of tokens XLA on CPU transposes small operands only, and without blocks copies none.
OTHERS = Chunking(chunk_tokens=512, chunk_bytes=2**28, block_bytes=2**28, ids_first=False, cast_once=True)


def softmax_cross_entropy(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
    chunking: Chunking | None = None,
) -> LossSums:
    """Sums over tokens: `loss` of weight * (lse - logit of the target), the cross-entropy, lse in float32.

    head      its w_VD is cast to the dtype of hidden_BTD. The gradient of w_VD is summed in float32 and has the dtype
              of w_VD
    z_loss    pulls lse towards 0 (PaLM: Chowdhery et al. 2022, section 5); 0 is off. Otherwise the metric `z_loss` is
              the sum of weight * z_loss * lse ** 2, and `objective` that and the cross-entropy together
    shards    over how many devices B and T are split: each goes through its own tokens and sums its own gradient of
              w_VD, which is added up once. Wrong figures cost communication, never correctness
    vocab_shards  over how many devices V is split: each goes through its own ids, and sums over ids are added up once
                  for each chunk
    chunking      None: what suits the platform

    The weight is summed over all targets; metrics: `accuracy`, the weight of targets that no logit exceeds.
    Gradients reach `hidden_BTD` and `head` through `main` alone; nothing reaches `weights_BT`. What has weight 0 may be
    anything, also infinite or not a number.
    """
    settings = (float(head.softcap), float(z_loss), (*shards, vocab_shards), chunking)
    main, parts = _sums(settings, hidden_BTD, head.w_VD, head.bias_V, targets_BT, weights_BT)
    parts, weight = jax.lax.stop_gradient(parts), jnp.sum(weights_BT)
    metrics = {name: parts[name] for name in parts if name != "loss"}
    if not z_loss:
        return LossSums(main, weight, metrics)
    return LossSums(parts["loss"], weight, metrics, objective=main)


def token_cross_entropy(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    *,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
    chunking: Chunking | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(loss_BT, correct_BT) of every token, with logits in the same chunks as in `softmax_cross_entropy`.

    loss_BT is float32, lse - logit of the target; correct_BT is true where the target is what greedy decoding would
    emit: the first of the ids with the largest logit. Without gradients.
    """
    settings = (float(head.softcap), (*shards, vocab_shards))

    def by(chunking: Chunking) -> Callable[..., tuple]:
        return functools.partial(_score, chunking, *settings)

    arrays = hidden_BTD, head.w_VD, head.bias_V, targets_BT
    if chunking is not None:
        return by(chunking)(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=by(TPU), default=by(OTHERS))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    settings: tuple,
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> Sums:
    return _on_platform(settings, False, hidden_BTD, w_VD, bias_V, targets_BT, weights_BT)[0]


def _sums_forward(settings: tuple, *arrays: jax.Array | None) -> tuple[Sums, Gradients]:
    return _on_platform(settings, True, *arrays)


def _sums_backward(settings: tuple, gradients: Gradients, cotangents: Sums) -> tuple:
    scaled = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
    return *scaled, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _on_platform(settings: tuple, gradients: bool, *arrays: jax.Array | None) -> tuple:
    softcap, z_loss, shards, chunking = settings

    def by(chunking: Chunking) -> Callable[..., tuple]:
        return functools.partial(_walk, chunking, softcap, z_loss, shards, gradients)

    if chunking is not None:
        return by(chunking)(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=by(TPU), default=by(OTHERS))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How tokens and ids are cut. X, Y and Z count the shards of B, T and V, which stay apart until the end.

    chunks  of the tokens of each shard; C is the size of one
    ids     of each shard, `block` of them at a time
    order   the dimensions of an array over tokens and ids; Z is number z, V the one after it
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
        return self.chunks.size

    @property
    def z(self) -> int:
        return self.order.index("Z")

    @property
    def states(self) -> str:
        """The dimensions of an array over tokens and shards of ids."""
        return self.order.replace("V", "")

    @property
    def num_blocks(self) -> int:
        return -(-self.ids // self.block)

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [X, Y, chunks, C, ...]: a chunk is a run of a shard's own tokens."""
        B, T, *more = x.shape
        x = x.reshape(self.X, B // self.X, self.Y, T // self.Y, *more).swapaxes(1, 2)
        return self.chunks.split(x.reshape(self.X, self.Y, self.chunks.tokens, *more), 2)

    def join(self, x: jax.Array, B: int, T: int) -> jax.Array:
        x = self.chunks.join(x, 2)
        x = x.reshape(self.X, self.Y, B // self.X, T // self.Y, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(B, T, *x.shape[4:])

    def zeros(self, dims: str, dtype: Any = jnp.float32, **sizes: int) -> jax.Array:
        return jnp.zeros(self._shape(dims, **sizes), dtype)

    def _shape(self, dims: str, **sizes: int) -> tuple[int, ...]:
        sizes = {"X": self.X, "Y": self.Y, "Z": self.Z, "C": self.C, "V": self.ids, **sizes}
        return tuple(sizes[dim] for dim in dims)

    def by_shard(self, x_XYC: jax.Array) -> jax.Array:
        return jnp.expand_dims(x_XYC, self.z)

    def by_id(self, x: jax.Array) -> jax.Array:
        return jnp.expand_dims(x, self.z + 1)

    def is_target(self, targets_XYC: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        """Which of the ids from `start` on. A sum that has one term thereby takes the place of a lookup, over which
        XLA's partitioner aborts within shard_map."""
        shape = self._shape(self.order, V=size)
        shard, place = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (self.z, self.z + 1))
        return shard * self.ids + start + place == self.by_id(self.by_shard(targets_XYC))

    def over_blocks(self, body: Callable, carry: Any) -> Any:
        """`body(number of the block, its first id, how many, carry) -> carry`, for one after the other."""
        count, rest = divmod(self.ids, self.block)
        if count == 1:
            carry = body(0, 0, self.block, carry)
        else:
            carry = jax.lax.fori_loop(0, count, lambda i, c: body(i, i * self.block, self.block, c), carry)
        return body(count, count * self.block, rest, carry) if rest else carry


def _cut(chunking: Chunking, shards: tuple[int, int, int], hidden_BTD: jax.Array, w_VD: jax.Array) -> _Cut:
    (B, T, _), V = hidden_BTD.shape, w_VD.shape[0]
    X, Y, Z = (math.gcd(count, size) for count, size in zip(shards, (B, T, V), strict=True))
    tokens, ids = B * T // (X * Y), V // Z
    fitting = chunking.chunk_bytes // (ids * hidden_BTD.dtype.itemsize)
    parts = chunks.cut(tokens, min(chunking.chunk_tokens, fitting))
    block = max(1, min(chunking.block_bytes // (4 * parts.size), ids))
    if block < ids:  # whole tiles, and all blocks alike where they are more than half as large
        alike = (n for n in range(TILE, block + 1, TILE) if ids % n == 0 and 2 * n > block)
        block = max(alike, default=block - block % TILE or block)
    return _Cut(X, Y, Z, parts, ids, block, "ZVXYC" if chunking.ids_first else "XYCZV")


def _walk(
    chunking: Chunking,
    softcap: float,
    z_loss: float,
    shards: tuple[int, int, int],
    gradients: bool,
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, Gradients | None]:
    """The sums, and the gradients of hidden_BTD, w_VD and bias_V, chunk by chunk."""
    (B, T, D), dtype = hidden_BTD.shape, hidden_BTD.dtype
    cut = _cut(chunking, shards, hidden_BTD, w_VD)
    w_ZVD = w_VD.reshape(cut.Z, cut.ids, D)
    w_ZVD = w_ZVD.astype(dtype) if chunking.cast_once else w_ZVD
    bias_ZV = None if bias_V is None else bias_V.astype(jnp.float32).reshape(cut.Z, cut.ids)
    tokens = tuple(cut.split(x) for x in (hidden_BTD, targets_BT, weights_BT.astype(jnp.float32)))
    dw_dims = "XYZVD" if chunking.ids_first else "XYDZV"

    def body(i: jax.Array, carry: tuple) -> tuple:
        sums, *more = carry
        h_XYCD, targets_XYC, weights_XYC = (jax.lax.dynamic_index_in_dim(x, i, 2, False) for x in tokens)
        # Selected, since a weight of 0 does not make 0 of what is not finite.
        h_XYCD = jnp.where(weights_XYC[..., None] == 0, 0, h_XYCD)
        w = w_ZVD if w_ZVD.dtype == dtype else jax.lax.optimization_barrier((w_ZVD, i))[0]
        chunk = _Chunk(cut, softcap, w, bias_ZV, h_XYCD, targets_XYC)
        largest_XYC, total_XYC, target_XYC, kept = chunk.read(tuple(more[3:]))
        lse_XYC = largest_XYC + jnp.log(total_XYC)
        found = {
            "loss": jnp.sum(weights_XYC * (lse_XYC - target_XYC)),
            "accuracy": jnp.sum(jnp.where(target_XYC >= largest_XYC, weights_XYC, 0.0)),
        }
        if z_loss:
            found["z_loss"] = jnp.sum(weights_XYC * (z_loss * jnp.square(lse_XYC)))
        sums = jax.tree.map(jnp.add, sums, found)
        if not gradients:
            return (sums,)
        scale_XYC = weights_XYC * (1.0 + 2.0 * z_loss * lse_XYC) / total_XYC
        dtarget_XYC = scale_XYC * jnp.exp(target_XYC - largest_XYC) - weights_XYC
        if softcap:
            dtarget_XYC *= 1.0 - jnp.square(target_XYC / softcap)
        dh, dw, dbias = more[:3]
        factors = largest_XYC, scale_XYC, dtarget_XYC
        dlogits, dw, dbias = chunk.add_gradients(kept, *factors, dw, dbias, dw_dims)
        dh_XYCD = jnp.einsum(f"{cut.order},ZVD->XYCD", dlogits, _cast(w, dtype))
        return sums, jax.lax.dynamic_update_index_in_dim(dh, dh_XYCD, i, 2), dw, dbias, dlogits, kept[1]

    carry: tuple = ({name: jnp.zeros([]) for name in ("loss", "accuracy", *(("z_loss",) if z_loss else ()))},)
    if gradients:
        numerators, references = cut.zeros(cut.order, dtype), cut.zeros(f"L{cut.states}", L=cut.num_blocks)
        dbias = None if bias_ZV is None else cut.zeros("XYZV")
        carry += (jnp.zeros_like(tokens[0]), cut.zeros(dw_dims, D=D), dbias, numerators, references)
    parts, *more = jax.lax.fori_loop(0, cut.chunks.count, body, carry)
    sums = parts["loss"] + parts["z_loss"] if z_loss else parts["loss"], parts
    if not gradients:
        return sums, None
    dw_ZVD = jnp.einsum(f"{dw_dims}->ZVD", more[1])
    dbias_V = None if bias_V is None else jnp.sum(more[2], (0, 1)).reshape(-1).astype(bias_V.dtype)
    return sums, (cut.join(more[0], B, T), dw_ZVD.reshape(w_VD.shape).astype(w_VD.dtype), dbias_V)


def _score(
    chunking: Chunking,
    softcap: float,
    shards: tuple[int, int, int],
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token and whether its target is the likeliest id, chunk by chunk."""
    (B, T, D), dtype = hidden_BTD.shape, hidden_BTD.dtype
    cut = _cut(chunking, shards, hidden_BTD, w_VD)
    w_ZVD = w_VD.reshape(cut.Z, cut.ids, D)
    w_ZVD = w_ZVD.astype(dtype) if chunking.cast_once else w_ZVD
    bias_ZV = None if bias_V is None else bias_V.astype(jnp.float32).reshape(cut.Z, cut.ids)

    def score(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk = _Chunk(cut, softcap, w_ZVD, bias_ZV, *arrays)
        largest_XYC, total_XYC, target_XYC, _ = chunk.read(())
        likeliest_XYC = chunk.likeliest(largest_XYC)
        return largest_XYC + jnp.log(total_XYC) - target_XYC, likeliest_XYC == arrays[1]

    tokens = (jnp.moveaxis(cut.split(x), 2, 0) for x in (hidden_BTD, targets_BT))
    loss, correct = jax.lax.map(score, tuple(tokens))
    return cut.join(jnp.moveaxis(loss, 0, 2), B, T), cut.join(jnp.moveaxis(correct, 0, 2), B, T)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """The tokens of a chunk and the weights to read them with.

    What is kept of their logits: numerators exp(logit - reference), times the slope of the cap, in the order of `cut`;
    and the references of each block, tokens and shards of ids.
    """

    cut: _Cut
    softcap: float
    w_ZVD: jax.Array
    bias_ZV: jax.Array | None
    h_XYCD: jax.Array
    targets_XYC: jax.Array

    def logits(self, start: jax.Array | int, size: int) -> jax.Array:
        """float32 logits of `size` ids of each shard from `start` on, with the dimensions in the order of `cut`."""
        w = _cast(jax.lax.dynamic_slice_in_dim(self.w_ZVD, start, size, 1), self.h_XYCD.dtype)
        raw = jnp.einsum(f"XYCD,ZVD->{self.cut.order}", self.h_XYCD, w, preferred_element_type=jnp.float32)
        if self.bias_ZV is not None:
            bias_ZV = jax.lax.dynamic_slice_in_dim(self.bias_ZV, start, size, 1)
            after = len(self.cut.order) - self.cut.z - 2
            raw = raw + bias_ZV.reshape((1,) * self.cut.z + bias_ZV.shape + (1,) * after)
        return cap_logits(raw, self.softcap)

    def likeliest(self, largest_XYC: jax.Array) -> jax.Array:
        """int32, the first id of each token whose logit is the largest, which is given."""
        cut, none = self.cut, self.cut.Z * self.cut.ids

        def block(number: jax.Array | int, start: jax.Array | int, size: int, first: jax.Array) -> jax.Array:
            logits = self.logits(start, size)
            shard, place = (
                jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (cut.z, cut.z + 1)
            )
            ids = shard * cut.ids + start + place
            is_largest = logits == cut.by_id(cut.by_shard(largest_XYC))
            return jnp.minimum(first, jnp.min(jnp.where(is_largest, ids, none), axis=cut.z + 1))

        return jnp.min(cut.over_blocks(block, cut.zeros(cut.states, jnp.int32) + none), axis=cut.z)

    def read(self, kept: tuple) -> tuple[jax.Array, jax.Array, jax.Array, tuple]:
        """Over tokens: the largest logit, the sum of exp(logit - largest), the target's logit; and `kept`, filled."""
        cut, v = self.cut, self.cut.z + 1

        def block(number: jax.Array | int, start: jax.Array | int, size: int, carry: tuple) -> tuple:
            largest, total, target, kept = carry
            logits = self.logits(start, size)
            higher = jnp.maximum(largest, jnp.max(logits, axis=v))
            exp = jnp.exp(logits - cut.by_id(higher))
            total = total * jnp.exp(largest - higher) + jnp.sum(exp, axis=v)
            target += jnp.sum(jnp.where(cut.is_target(self.targets_XYC, start, size), logits, 0.0), axis=v)
            if kept:
                exp = exp * (1.0 - jnp.square(logits / self.softcap)) if self.softcap else exp
                numerators = jax.lax.dynamic_update_slice_in_dim(kept[0], exp.astype(kept[0].dtype), start, v)
                kept = numerators, jax.lax.dynamic_update_index_in_dim(kept[1], higher, number, 0)
            return higher, total, target, kept

        zero = cut.zeros(cut.states)
        start = (zero - jnp.inf, zero, zero, kept)
        largest, total, target, kept = cut.over_blocks(block, start)
        largest_XYC = jnp.max(largest, axis=cut.z)
        total *= jnp.exp(largest - cut.by_shard(largest_XYC))
        return largest_XYC, jnp.sum(total, axis=cut.z), jnp.sum(target, axis=cut.z), kept

    def add_gradients(
        self,
        kept: tuple,
        largest_XYC: jax.Array,
        scale_XYC: jax.Array,
        dtarget_XYC: jax.Array,
        dw: jax.Array,
        dbias: jax.Array | None,
        dw_dims: str,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The gradient of the logits, in the place of the numerators, and `dw` and `dbias` with those of the head."""
        cut, v, dw_v = self.cut, self.cut.z + 1, dw_dims.index("V")
        numerators, references = kept

        def block(number: jax.Array | int, start: jax.Array | int, size: int, carry: tuple) -> tuple:
            dlogits, dw, dbias = carry
            scale = cut.by_shard(scale_XYC) * jnp.exp(references[number] - cut.by_shard(largest_XYC))
            part = jax.lax.dynamic_slice_in_dim(dlogits, start, size, v) * cut.by_id(scale)
            dtarget = cut.by_id(cut.by_shard(dtarget_XYC))
            part = jnp.where(cut.is_target(self.targets_XYC, start, size), dtarget, part)
            part = part.astype(dlogits.dtype)
            dw_part = jnp.einsum(
                f"{cut.order},XYCD->{dw_dims}", part, self.h_XYCD, preferred_element_type=jnp.float32
            )
            dw_part += jax.lax.dynamic_slice_in_dim(dw, start, size, dw_v)
            dlogits = jax.lax.dynamic_update_slice_in_dim(dlogits, part, start, v)
            if dbias is not None:
                dbias_part = jnp.einsum(f"{cut.order}->XYZV", part.astype(jnp.float32))
                dbias_part += jax.lax.dynamic_slice_in_dim(dbias, start, size, 3)
                dbias = jax.lax.dynamic_update_slice_in_dim(dbias, dbias_part, start, 3)
            return dlogits, jax.lax.dynamic_update_slice_in_dim(dw, dw_part, start, dw_v), dbias

        return cut.over_blocks(block, (numerators, dw, dbias))


def _cast(w: jax.Array, dtype: Any) -> jax.Array:
    """`w` in `dtype`. Rounded to it first, or else XLA on TPU would cast all weights once and hold the copy."""
    if w.dtype == dtype:
        return w
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w, info.nexp, info.nmant).astype(dtype)
