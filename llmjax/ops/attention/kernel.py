"""What an attention kernel on one device has to offer, and the attention of one device made of it.

A `Kernel` lets queries attend to one set of keys at a time. Its softmax is always finished: `out`, divided, and `lse`,
the logarithm of the denominator, of all keys so far; further keys join it as in the online softmax (Milakov and
Gimelshein 2018). So the algorithms that bring keys from elsewhere do not know how blocks are computed, nor the kernels
where keys come from. A sink is a softmax that has begun, with a score and no value.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.ops.attention.mask import Mask

NOTHING = -1e20  # log-sum-exp of a query that sees nothing: far below any score, far above full.HIDDEN
SAVED = ("attention_out", "attention_lse")  # what remat has to keep for no attention to be computed twice

Cut = jax.Array  # in whatever shape a kernel computes with
Softmax = tuple[Cut, Cut]  # out and lse


class Kernel(Protocol):
    """Attention of one device; a hashable value that holds its settings, such as soft-cap and block sizes.

    Sums are float32 inside of a call and rounded to the dtype of the accumulator at its end. A key gives nothing to a
    query that does not see it, and takes nothing from it, whatever numbers they hold (`apart`).
    """

    def cut_queries(self, x_BTNH: jax.Array, K: int) -> Cut:
        """Queries of K key/value heads, or what else has their shape."""

    def join_queries(self, x: Cut, T: int) -> jax.Array:
        """x_BTNH, of which `cut_queries` made x."""

    def cut_keys(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> Cut:
        """Keys and values as one array, which can travel."""

    def join_keys(self, kv: Cut, S: int) -> tuple[jax.Array, jax.Array]:
        """k_BSKH and v_BSKH, of which `cut_keys` made kv."""

    def forward(self, q: Cut, kv: Cut, mask: Mask, softmax: Softmax) -> Softmax:
        """`softmax` after these keys have joined it. Scores are q k / sqrt(H)."""

    def backward(
        self, q: Cut, kv: Cut, mask: Mask, dout: Cut, lse: Cut, delta: Cut, dq: Cut | None, dkv: Cut | None
    ) -> tuple[Cut | None, Cut | None]:
        """`dq` and `dkv` with what comes from these keys added to them; None for one that is not asked for.

        lse and delta = sum_H(dout * out) are of the whole softmax, of which these keys may be a part.
        """


class Sizes(NamedTuple):
    """What cut arrays do not tell: tokens of the queries and of the keys on this device, and key/value heads."""

    T: int
    S: int
    K: int


def attend(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """out_BTNH, in the dtype of q, equal to `full.attend`, of keys that all lie on this device."""
    return _attend(kernel, sizes_of(q_BTNH, k_BSKH), q_BTNH, k_BSKH, v_BSKH, sinks_N, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask):
    return _attend_forward(kernel, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask)[0]


def _attend_forward(kernel, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask):
    q, kv = kernel.cut_queries(q_BTNH, sizes.K), kernel.cut_keys(k_BSKH, v_BSKH)
    out, lse = kernel.forward(q, kv, mask, begin(kernel, sizes, q_BTNH, sinks_N, q.dtype))
    out_BTNH, lse = named(kernel.join_queries(out, sizes.T), lse)
    return out_BTNH, (q, kv, sinks_N, mask, out_BTNH, lse)


def _attend_backward(kernel, sizes, saved, dout_BTNH):
    q, kv, sinks_N, mask, out_BTNH, lse = saved
    dout_BTNH, out_BTNH = jax.lax.optimization_barrier((dout_BTNH, out_BTNH))  # kept as it is: not in float32
    dout, delta = pulled(kernel, sizes, out_BTNH, dout_BTNH)
    dsinks_N = sinks_gradient(kernel, sizes, sinks_N, lse, delta)
    dq, dkv = kernel.backward(q, kv, mask, dout, lse, delta, jnp.zeros_like(q), jnp.zeros_like(kv))
    return kernel.join_queries(dq, sizes.T), *kernel.join_keys(dkv, sizes.S), dsinks_N, None


_attend.defvjp(_attend_forward, _attend_backward)


def sizes_of(q_BTNH: jax.Array, k_BSKH: jax.Array) -> Sizes:
    return Sizes(q_BTNH.shape[1], *k_BSKH.shape[1:3])


def begin(
    kernel: Kernel, sizes: Sizes, q_BTNH: jax.Array, sinks_N: jax.Array | None, dtype: jnp.dtype
) -> Softmax:
    """The softmax before any key: nothing, or the sinks alone. `dtype` is the type of out."""
    B, T, N, _ = q_BTNH.shape
    scores_N = jnp.full((N,), NOTHING) if sinks_N is None else sinks_N
    lse_BTN = jnp.broadcast_to(scores_N.astype(jnp.float32)[None, None], (B, T, N))
    out = jnp.zeros(jax.eval_shape(lambda x: kernel.cut_queries(x, sizes.K), q_BTNH).shape, dtype)
    return out, _cut_rows(kernel, sizes, lse_BTN)


def named(out_BTNH: jax.Array, lse: Cut) -> tuple[jax.Array, Cut]:
    """The two with the names by which remat may keep them."""
    return checkpoint_name(out_BTNH, SAVED[0]), checkpoint_name(lse, SAVED[1])


def pulled(kernel: Kernel, sizes: Sizes, out_BTNH: jax.Array, dout_BTNH: jax.Array) -> tuple[Cut, Cut]:
    """dout and delta = sum_H(dout * out), as the backward pass wants them."""
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    return kernel.cut_queries(dout_BTNH, sizes.K), _cut_rows(kernel, sizes, delta_BTN)


def sinks_gradient(
    kernel: Kernel, sizes: Sizes, sinks_N: jax.Array | None, lse: Cut, delta: Cut
) -> jax.Array | None:
    """The gradient of sinks_N, which lse contains. Without a value, all a sink does is take from other weights."""
    if sinks_N is None:
        return None
    lse_BTN, delta_BTN = (kernel.join_queries(x[..., None], sizes.T)[..., 0] for x in (lse, delta))
    weights_BTN = jnp.exp(sinks_N.astype(jnp.float32)[None, None] - lse_BTN)
    return -jnp.sum(weights_BTN * delta_BTN, axis=(0, 1)).astype(sinks_N.dtype)


def _cut_rows(kernel: Kernel, sizes: Sizes, x_BTN: jax.Array) -> Cut:
    return kernel.cut_queries(x_BTN[..., None], sizes.K)[..., 0]
