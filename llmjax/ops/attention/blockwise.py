"""Attention by blocks of queries: exact, linear in memory, and blind to keys that cannot be visible.

Queries are taken `block` at a time, each block against all its keys at once, so that a softmax needs no
running maximum. The backward pass recomputes the weights from each row's saved maximum and sum (Rabe and
Staats 2021; FlashAttention: Dao et al. 2022). Where the mask is causal and in order, keys after a block are
never touched, nor those behind its window. The bounds are static, hence at most `STRIPES` of them.

Every product is a plain batched one. The gradients of keys and values are formed transposed, [H, S]: XLA on
CPU is three times slower where the left operand is contracted over its rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.ops.attention.full import NEGATIVE
from llmjax.ops.attention.mask import Mask

STRIPES = 8  # of attention's S x T square, at most: (1 + 1/8) / 2 of it is computed where it is causal


class _Stripe(NamedTuple):
    """Queries [first, end) need keys [k_first, k_end)."""

    first: int
    end: int
    k_first: int
    k_end: int


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    block: int = 128,
) -> jax.Array:
    """out_BTNH, in the dtype of q, equal to `full.attend`. Scores and softmax are float32.

    N must be a multiple of K; `scale` defaults to H ** -0.5; `block` queries are in work at a time. T and S
    lie whole on every device; B and the heads may be sharded.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    block = min(block, T)
    pad = -T % block
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    q_BKGTH = jnp.pad(q_BKGTH, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    rows = tuple(jnp.pad(x, ((0, 0), (0, pad))) for x in (mask.q_segments_BT, mask.q_positions_BT))
    columns = (mask.k_segments_BS, mask.k_positions_BS)
    settings = (H**-0.5 if scale is None else scale, block, mask.causal, mask.window, mask.in_order)
    out_BKGTH = _attend(settings, q_BKGTH, k_BKSH, v_BKSH, rows, columns)
    return out_BKGTH[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _stripes(T: int, S: int, settings: tuple) -> list[_Stripe]:
    _, block, causal, window, in_order = settings
    if not (causal and in_order):
        return [_Stripe(0, T, 0, S)]
    height = -(-T // block // STRIPES) * block
    stripes = []
    for first in range(0, T, height):
        oldest = max(0, first - window + 1) // height * height if window else 0
        stripes.append(_Stripe(first, min(first + height, T), oldest, min(first + height, S)))
    return stripes


def _visible(settings: tuple, rows: tuple, columns: tuple) -> jax.Array:
    _, _, causal, window, _ = settings
    mask = Mask(rows[0], columns[0], rows[1], columns[1], causal, window)
    return mask.dense_BTS()[:, None, None]


def _by_block(block: int, function, carry, *arrays: tuple[jax.Array, int]):
    """Scans `function(carry, *slices) -> (carry, outs_BKGtX)` over blocks of each array's axis."""
    count = arrays[0][0].shape[arrays[0][1]] // block
    if count == 1:
        return function(carry, *(x for x, _ in arrays))
    cut = [jnp.moveaxis(x.reshape(*x.shape[:a], count, block, *x.shape[a + 1 :]), a, 0) for x, a in arrays]
    carry, outs = jax.lax.scan(lambda c, xs: function(c, *xs), carry, cut)
    join = lambda y: jnp.moveaxis(y, 0, 3).reshape(*y.shape[1:4], count * block, *y.shape[5:])  # noqa: E731
    return carry, jax.tree.map(join, outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, q_BKGTH, k_BKSH, v_BKSH, rows, columns):
    return _forward(settings, q_BKGTH, k_BKSH, v_BKSH, rows, columns)[0]


def _forward(settings, q_BKGTH, k_BKSH, v_BKSH, rows, columns):
    scale, block = settings[:2]
    parts = []
    for s in _stripes(q_BKGTH.shape[3], k_BKSH.shape[2], settings):
        k, v = k_BKSH[:, :, s.k_first : s.k_end], v_BKSH[:, :, s.k_first : s.k_end]
        keys = tuple(x[:, s.k_first : s.k_end] for x in columns)

        def one(carry, q, segments, positions, k=k, v=v, keys=keys):
            visible = _visible(settings, (segments, positions), keys)
            scores = _scores(q, k, scale)
            largest = jnp.max(jnp.where(visible, scores, NEGATIVE), axis=-1, keepdims=True)
            weights = jnp.where(visible, jnp.exp(scores - largest), 0.0)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            total = jnp.where(total == 0.0, 1.0, total)  # a query that sees nothing gets zeros
            out = _merged("BKtS,BKSH->BKtH", weights.astype(v.dtype), v) / total
            return carry, (out.astype(q.dtype), largest, jnp.log(total))

        queries = [(q_BKGTH, 3), *((x, 1) for x in rows)]
        queries = [(jax.lax.slice_in_dim(x, s.first, s.end, axis=a), a) for x, a in queries]
        parts.append(_by_block(block, one, None, *queries)[1])
    out_BKGTH, *softmax = (jnp.concatenate(xs, axis=3) for xs in zip(*parts, strict=True))
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, rows, columns, out_BKGTH, *softmax)


def _backward(settings, saved, dout_BKGTH):
    scale, block = settings[:2]
    q_BKGTH, k_BKSH, v_BKSH, rows, columns, out_BKGTH, *softmax = saved
    stripes = _stripes(q_BKGTH.shape[3], k_BKSH.shape[2], settings)
    delta_BKGT1 = jnp.sum((dout_BKGTH * out_BKGTH).astype(jnp.float32), axis=-1, keepdims=True)
    # transposed before they are cut: XLA would fold a transpose right at the product into it, and be slow
    q_BKHGT, dout_BKHGT = q_BKGTH.transpose(0, 1, 4, 2, 3), dout_BKGTH.transpose(0, 1, 4, 2, 3)
    dqs, dks, dvs = [], [], []
    for s in stripes:
        k, v = k_BKSH[:, :, s.k_first : s.k_end], v_BKSH[:, :, s.k_first : s.k_end]
        keys = tuple(x[:, s.k_first : s.k_end] for x in columns)

        def one(
            carry, q, dout, q_t, dout_t, delta, largest, log_total, segments, positions, k=k, v=v, keys=keys
        ):
            visible = _visible(settings, (segments, positions), keys)
            weights = jnp.where(visible, jnp.exp(_scores(q, k, scale) - largest - log_total), 0.0)
            dscores = (weights * (_scores(dout, v, 1.0) - delta) * scale).astype(q.dtype)
            dq = _merged("BKtS,BKSH->BKtH", dscores, k).astype(q.dtype)
            dk, dv = _product(q_t, dscores), _product(dout_t, weights.astype(q.dtype))
            return (dk, dv) if carry is None else (carry[0] + dk, carry[1] + dv), dq

        queries = [(q_BKGTH, 3), (dout_BKGTH, 3), (q_BKHGT, 4), (dout_BKHGT, 4)]
        queries += [(x, 3) for x in (delta_BKGT1, *softmax)] + [(x, 1) for x in rows]
        queries = [(jax.lax.slice_in_dim(x, s.first, s.end, axis=a), a) for x, a in queries]
        carry = None
        if s.end - s.first > block:
            B, K, S, H = k.shape
            carry = (jnp.zeros((B, K, H, S), jnp.float32), jnp.zeros((B, K, H, S), jnp.float32))
        (dk, dv), dq = _by_block(block, one, carry, *queries)
        dqs.append(dq)
        dks.append(dk)
        dvs.append(dv)
    # Behind a barrier: with a transpose folded into it, XLA on CPU lacks this product for bfloat16.
    sums = jax.lax.optimization_barrier([_sum_keys(parts, stripes) for parts in (dks, dvs)])
    dk_BKSH, dv_BKSH = (x.swapaxes(2, 3).astype(k_BKSH.dtype) for x in sums)
    return jnp.concatenate(dqs, axis=3), dk_BKSH, dv_BKSH, (None, None), (None, None)


_attend.defvjp(_forward, _backward)


def _merged(subscripts: str, x_BKGtX: jax.Array, y: jax.Array) -> jax.Array:
    """The product with the query heads of a group taken as further rows t."""
    B, K, G, t, X = x_BKGtX.shape
    out = jnp.einsum(subscripts, x_BKGtX.reshape(B, K, G * t, X), y, preferred_element_type=jnp.float32)
    return out.reshape(B, K, G, t, out.shape[-1])


def _scores(q_BKGtH: jax.Array, k_BKSH: jax.Array, scale: float) -> jax.Array:
    scores = _merged("BKtH,BKSH->BKtS", q_BKGtH, k_BKSH)
    return scores if scale == 1.0 else scores * scale


def _product(x_BKHGt: jax.Array, y_BKGtS: jax.Array) -> jax.Array:
    """x y [B, K, H, S], float32, summed over the rows and the query heads of a group."""
    B, K, H, G, t = x_BKHGt.shape
    x_BKHt, y_BKtS = x_BKHGt.reshape(B, K, H, G * t), y_BKGtS.reshape(B, K, G * t, -1)
    return jnp.einsum("BKHt,BKtS->BKHS", x_BKHt, y_BKtS, preferred_element_type=jnp.float32)


def _sum_keys(parts: list[jax.Array], stripes: list[_Stripe]) -> jax.Array:
    """The sum of arrays whose last axis covers a stripe's keys. Every bound is a stripe's end."""
    pieces, first = [], 0
    for end in sorted({s.k_end for s in stripes}):
        covering = [
            p[..., first - s.k_first : end - s.k_first]
            for p, s in zip(parts, stripes, strict=True)
            if s.k_first <= first and end <= s.k_end
        ]
        pieces.append(functools.reduce(jnp.add, covering))
        first = end
    return jnp.concatenate(pieces, axis=-1)
