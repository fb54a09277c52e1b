"""Attention kernels for TPUs, written in Pallas. Their grid is the list of block pairs with visible keys.

A block of queries and a block of keys form a pair only if segments, positions, causality and window let some query
see some key. The list of pairs is computed before the kernel starts, while the program runs, and passed to the kernel
in scalar memory; its length is the length of the grid. So attention over packed documents costs what it would cost
for each document separately, and keys that travel around a ring for other devices cost nothing. Pairs in which
everything is visible skip the mask.

The passes over queries (output, gradient of queries) keep a block of queries in VMEM and stream blocks of keys. The
pass over keys (gradients of keys and values) does the reverse, with transposed scores. Thus coordinates and
statistics of the streamed block always lie along the lanes, as they are stored, and only the ones of the resident block
are transposed, once per row of the list. The algorithm is FlashAttention 2 (Dao 2023).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llmjax.ops import chunks
from llmjax.ops.attention import kernel
from llmjax.ops.attention.full import HIDDEN_SCORE
from llmjax.ops.attention.isolation import mark_nonfinite_values, zero_nonfinite
from llmjax.ops.attention.kernel import KernelArray, Softmax
from llmjax.ops.attention.mask import Mask
from llmjax.ops.attention.pairs import FIRST, LAST, WHOLE
from llmjax.ops.attention.tpu_schedule import LANES, BlockSchedule
from llmjax.ops.logits import softcap as cap_scores

# The dimension numbers of x @ y.T.
CONTRACT_LAST = (((1,), (1,)), ((), ()))


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    softcap: float = 0.0,
    sinks_N: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """out_BTNH, in the dtype of q, equal to `full.attend`, on a TPU. `interpret` runs the kernel in Pallas'
    interpreter, on any platform, slowly."""
    return kernel.attend(PallasTPU(softcap, interpret=interpret), q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)


@dataclasses.dataclass(frozen=True)
class PallasTPU:
    """The `Kernel` contract on a TPU. Queries have the layout q_BKGTH and keys kv_2BKSH, padded to whole blocks.

    rows       the most rows of a query block: its queries, counted for every query head of a group
    keys       the most tokens of a key block
    interpret  see `attend`

    The default sizes are choices.
    """

    softcap: float = 0.0
    rows: int = 1024
    keys: int = 512
    interpret: bool = False

    def cut_queries(self, x_BTNH: jax.Array, K: int) -> KernelArray:
        B, T, N, H = x_BTNH.shape
        x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, -T % self._q_size(T, N // K)), (0, 0), (0, 0)))
        return x_BTNH.reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 1, 4)

    def join_queries(self, x_BKGTH: KernelArray, T: int) -> jax.Array:
        B, K, G, _, H = x_BKGTH.shape
        return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, K * G, H)[:, :T]

    def cut_keys(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> KernelArray:
        kv_2BSKH, S = jnp.stack([k_BSKH, v_BSKH]), k_BSKH.shape[1]
        padding = ((0, 0), (0, 0), (0, -S % self._k_size(S)), (0, 0), (0, 0))
        return jnp.pad(kv_2BSKH, padding).transpose(0, 1, 3, 2, 4)

    def join_keys(self, kv_2BKSH: KernelArray, S: int) -> tuple[jax.Array, jax.Array]:
        k_BSKH, v_BSKH = kv_2BKSH.transpose(0, 1, 3, 2, 4)[:, :, :S]
        return k_BSKH, v_BSKH

    def forward(self, q: KernelArray, kv: KernelArray, mask: Mask, softmax: Softmax) -> Softmax:
        schedule = self._schedule(q, kv, mask, by_keys=False)
        body = functools.partial(_forward_body, mask, self.softcap)
        scratch = [(schedule.rows, q.shape[4]), (schedule.rows, LANES), (schedule.rows, LANES)]
        sums = {"queries": softmax[0], "rows": softmax[1]}
        out, lse = schedule.run(body, {"queries": (q,), "keys": (kv,)}, sums, scratch)
        return out, lse

    def backward(
        self,
        q: KernelArray,
        kv: KernelArray,
        mask: Mask,
        dout: KernelArray,
        lse: KernelArray,
        delta: KernelArray,
        dq: KernelArray | None,
        dkv: KernelArray | None,
    ) -> tuple[KernelArray | None, KernelArray | None]:
        inputs, H = {"queries": (q, dout), "keys": (kv,), "rows": (lse, delta)}, q.shape[4]
        if dq is not None:
            schedule = self._schedule(q, kv, mask, by_keys=False)
            body = functools.partial(_backward_body_of_queries, mask, self.softcap)
            scratch = [(schedule.rows, H), (schedule.rows, LANES), (schedule.rows, LANES)]
            (dq,) = schedule.run(body, inputs, {"queries": dq}, scratch)
        if dkv is not None:
            schedule = self._schedule(q, kv, mask, by_keys=True)
            body = functools.partial(_backward_body_of_keys, mask, self.softcap)
            (dkv,) = schedule.run(body, inputs, {"keys": dkv}, [(2, schedule.k_size, H)])
        return dq, dkv

    def _schedule(self, q: KernelArray, kv: KernelArray, mask: Mask, *, by_keys: bool) -> BlockSchedule:
        G, T, S = *q.shape[2:4], kv.shape[3]
        return BlockSchedule(mask, T, S, G, self._q_size(T, G), self._k_size(S), by_keys, self.interpret)

    def _q_size(self, T: int, G: int) -> int:
        return _block_size(T, max(LANES, self.rows // G // LANES * LANES))

    def _k_size(self, S: int) -> int:
        return _block_size(S, self.keys)


def _block_size(tokens: int, limit: int) -> int:
    """The size of the blocks that `tokens` are cut into: a multiple of LANES, at most `limit`, with little padding."""
    return chunks.cut(-(-tokens // LANES), limit // LANES).size * LANES


def _forward_body(
    mask,
    softcap,
    flags,
    q_coords,
    k_coords,
    q,
    kv,
    out_before,
    lse_before,
    out,
    lse,
    coords,
    acc,
    largest,
    total,
):
    G, size, H = q.shape
    rows = G * size

    # The first pair of a row loads the accumulators, the pairs add to them, and the last pair writes the results.
    @pl.when(flags & FIRST != 0)
    def _():
        acc[...] = out_before[...].reshape(rows, H).astype(jnp.float32)
        _write_columns(lse_before, largest)
        total[...] = jnp.ones_like(total)
        _write_coord_columns(q_coords, coords)

    def add(whole):
        keys, values = (kv[0], kv[1]) if whole else mark_nonfinite_values(kv[0], kv[1])
        scores = _dot(q[...].reshape(rows, H), keys, CONTRACT_LAST) * H**-0.5
        scores = cap_scores(scores, softcap)
        if not whole:
            scores = jnp.where(_visible(mask, coords, k_coords), scores, HIDDEN_SCORE)
        # Online softmax: rescale what was summed under the old largest score, and add this block.
        new = jnp.maximum(largest[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - new[:, :1])
        shrink = jnp.exp(largest[...] - new)
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        acc[...] = acc[...] * shrink[:, :1] + _dot(weights.astype(kv.dtype), values)
        largest[...] = new

    # Two programs, one without the mask, for pairs in which everything is visible.
    pl.when(flags & WHOLE != 0)(lambda: add(True))
    pl.when(flags & WHOLE == 0)(lambda: add(False))

    @pl.when(flags & LAST != 0)
    def _():
        out[...] = (acc[...] / total[:, :1]).reshape(G, size, H).astype(out.dtype)
        column = largest[...] + jnp.log(total[...])
        for g in range(G):
            lse[g, :] = column[g * size : (g + 1) * size].T[0]


def _backward_body_of_queries(
    mask, softcap, flags, q_coords, k_coords, q, dout, kv, lse, delta, dq_before, dq, coords, acc, lse_column,
    delta_column,
):  # fmt: skip
    G, size, H = q.shape
    rows = G * size

    @pl.when(flags & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        _write_columns(lse, lse_column)
        _write_columns(delta, delta_column)
        _write_coord_columns(q_coords, coords)

    def add(whole):
        scores = cap_scores(_dot(q[...].reshape(rows, H), kv[0], CONTRACT_LAST) * H**-0.5, softcap)
        weights = jnp.exp(scores - lse_column[:, :1])
        # The gradient of the softmax: weight * (d weight - delta). If scores are soft-capped, the derivative of the
        # cap follows.
        dscores = weights * (_dot(dout[...].reshape(rows, H), kv[1], CONTRACT_LAST) - delta_column[:, :1])
        if softcap:
            dscores *= 1.0 - jnp.square(scores / softcap)
        if not whole:
            dscores = jnp.where(_visible(mask, coords, k_coords), dscores, 0.0)
        acc[...] += _dot(dscores.astype(kv.dtype), kv[0] if whole else zero_nonfinite(kv[0]))

    pl.when(flags & WHOLE != 0)(lambda: add(True))
    pl.when(flags & WHOLE == 0)(lambda: add(False))

    @pl.when(flags & LAST != 0)
    def _():
        more = (acc[...] * H**-0.5).reshape(G, size, H)
        dq[...] = (dq_before[...].astype(jnp.float32) + more).astype(dq.dtype)


def _backward_body_of_keys(
    mask, softcap, flags, q_coords, k_coords, q, dout, kv, lse, delta, dkv_before, dkv, coords, acc
):
    G, _, H = q.shape

    @pl.when(flags & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        _write_coord_columns(k_coords, coords)

    def add(whole):
        for g in range(G):
            scores = cap_scores(_dot(kv[0], q[g], CONTRACT_LAST) * H**-0.5, softcap)
            weights = jnp.exp(scores - lse[g : g + 1])
            dscores = weights * (_dot(kv[1], dout[g], CONTRACT_LAST) - delta[g : g + 1])
            if softcap:
                dscores *= 1.0 - jnp.square(scores / softcap)
            queries, douts = q[g], dout[g]
            if not whole:
                visible = _visible(mask, coords, q_coords, transposed=True)
                weights, dscores = jnp.where(visible, weights, 0.0), jnp.where(visible, dscores, 0.0)
                queries, douts = zero_nonfinite(queries), zero_nonfinite(douts)
            acc[0] += _dot(dscores.astype(q.dtype), queries)
            acc[1] += _dot(weights.astype(q.dtype), douts)

    pl.when(flags & WHOLE != 0)(lambda: add(True))
    pl.when(flags & WHOLE == 0)(lambda: add(False))

    @pl.when(flags & LAST != 0)
    def _():
        dkv[0] = (dkv_before[0].astype(jnp.float32) + acc[0] * H**-0.5).astype(dkv.dtype)
        dkv[1] = (dkv_before[1].astype(jnp.float32) + acc[1]).astype(dkv.dtype)


def _dot(x: jax.Array, y: jax.Array, dimensions: Any = (((1,), (0,)), ((), ()))) -> jax.Array:
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _visible(mask: Mask, resident: Any, streamed: Any, transposed: bool = False) -> jax.Array:
    """bool, the visibility within a pair: the resident block along the sublanes, the streamed block along the lanes.

    transposed  the resident block holds keys; otherwise queries
    """
    columns = resident[0][:, :1], resident[1][:, :1]
    rows = streamed[0:1], streamed[1:2]
    return mask.visible(*rows, *columns) if transposed else mask.visible(*columns, *rows)


def _as_column(row: jax.Array) -> jax.Array:
    """The row [n] along the sublanes, [n, LANES]; every lane has a copy."""
    return jnp.broadcast_to(row[None], (LANES, row.shape[0])).T


def _write_columns(rows: Any, columns: Any) -> None:
    """Writes the rows [G, n] below one another, [G n, LANES]."""
    size = rows.shape[1]
    for g in range(rows.shape[0]):
        columns[g * size : (g + 1) * size] = _as_column(rows[g])


def _write_coord_columns(coords: Any, columns: Any) -> None:
    """Writes segments and positions [2, n] as [2, G n, LANES], repeated for each query head of the group."""
    size = coords.shape[1]
    for g in range(columns.shape[1] // size):
        for i in range(2):
            columns[i, g * size : (g + 1) * size] = _as_column(coords[i])
