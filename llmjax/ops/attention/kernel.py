"""The contract of attention kernels on one device, and attention on one device built from a kernel.

A `Kernel` lets queries attend to one set of keys at a time. Its softmax is always complete for the keys so far: `out`
is divided by the denominator, and `lse` is the logarithm of the denominator. Further keys are merged in as in the
online softmax (Milakov and Gimelshein 2018). So the algorithms that bring keys from other devices need not know how
blocks are computed, and kernels need not know where keys come from. An attention sink is a softmax that starts with
one score and no value.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.ops.attention.mask import Mask
from llmjax.ops.position_bias import PositionBias

# The log-sum-exp of a query that has seen no key. It is far below any real score and far above full.HIDDEN_SCORE, so
# that hidden keys get the weight exp(HIDDEN_SCORE - EMPTY_LSE) = 0.
EMPTY_LSE = -1e20
# The names of the arrays that remat must keep so that the backward pass does not compute attention again.
SAVED = ("attention_out", "attention_lse")

# An array in the layout that a kernel computes with, which differs from kernel to kernel.
KernelArray = jax.Array
# The output and its log-sum-exp.
Softmax = tuple[KernelArray, KernelArray]


class Kernel(Protocol):
    """Attention on one device. A kernel is a hashable value that holds its settings, such as soft-cap and block
    sizes.

    Within a call, sums are float32; at its end they are rounded to the dtype of the accumulator. A key that a query
    does not see has no effect on it, even if either of them holds infinities or NaN (`isolation`).
    """

    def cut_queries(self, x_BTNH: jax.Array, K: int) -> KernelArray:
        """x_BTNH in the layout of the kernel. K is the number of key/value heads. Also for arrays shaped like
        queries."""

    def join_queries(self, x: KernelArray, T: int) -> jax.Array:
        """The inverse of `cut_queries`, x_BTNH, of T tokens."""

    def cut_keys(self, k_BSKH: jax.Array, v_BSKH: jax.Array) -> KernelArray:
        """Keys and values in the layout of the kernel, as one array, which can be sent to other devices."""

    def join_keys(self, kv: KernelArray, S: int) -> tuple[jax.Array, jax.Array]:
        """The inverse of `cut_keys`: k_BSKH and v_BSKH, of S tokens."""

    def forward(self, q: KernelArray, kv: KernelArray, mask: Mask, softmax: Softmax) -> Softmax:
        """Merges the keys `kv` into `softmax` and returns the result. Scores are q k / sqrt(H)."""

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
        """Adds the contribution of the keys `kv` to the gradients `dq` and `dkv`; a gradient that is None is not
        computed.

        lse and delta = sum_H(dout * out) belong to the softmax over all keys, of which `kv` may be a part.
        """


@runtime_checkable
class BiasedKernel(Protocol):
    """A kernel that can also add a bias of positions to its scores, where all keys lie on this device."""

    def forward_biased(
        self, q: KernelArray, kv: KernelArray, mask: Mask, softmax: Softmax, position_bias: PositionBias
    ) -> Softmax:
        """`Kernel.forward` with this bias."""

    def backward_biased(
        self,
        q: KernelArray,
        kv: KernelArray,
        mask: Mask,
        dout: KernelArray,
        lse: KernelArray,
        delta: KernelArray,
        position_bias: PositionBias,
    ) -> tuple[KernelArray, KernelArray, jax.Array]:
        """The gradients of `q`, `kv` and `position_bias.table_RN`, see `Kernel.backward`."""


class Sizes(NamedTuple):
    """Sizes that the kernel layout does not tell: tokens of the queries (T) and of the keys (S) on this device, and
    the number of key/value heads (K)."""

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
    position_bias: PositionBias | None = None,
) -> jax.Array:
    """out_BTNH, in the dtype of q, equal to `full.attend`. All keys lie on this device. Only a `BiasedKernel` can have
    a `position_bias`."""
    sizes = sizes_of(q_BTNH, k_BSKH)
    return _attend(kernel, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, position_bias, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, position_bias, mask):
    return _attend_forward(kernel, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, position_bias, mask)[0]


def _attend_forward(kernel, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, position_bias, mask):
    q, kv = kernel.cut_queries(q_BTNH, sizes.K), kernel.cut_keys(k_BSKH, v_BSKH)
    softmax = initial_softmax(kernel, sizes, q_BTNH, sinks_N, q.dtype)
    if position_bias is None:
        out, lse = kernel.forward(q, kv, mask, softmax)
    else:
        out, lse = kernel.forward_biased(q, kv, mask, softmax, position_bias)
    out_BTNH, lse = with_remat_names(kernel.join_queries(out, sizes.T), lse)
    return out_BTNH, (q, kv, sinks_N, position_bias, mask, out_BTNH, lse)


def _attend_backward(kernel, sizes, saved, dout_BTNH):
    q, kv, sinks_N, position_bias, mask, out_BTNH, lse = saved
    # The barrier keeps XLA from storing float32 copies of these arrays, which `output_gradients` casts.
    dout_BTNH, out_BTNH = jax.lax.optimization_barrier((dout_BTNH, out_BTNH))
    dout, delta = output_gradients(kernel, sizes, out_BTNH, dout_BTNH)
    dsinks_N = sinks_gradient(kernel, sizes, sinks_N, lse, delta)
    if position_bias is None:
        dbias = None
        dq, dkv = kernel.backward(q, kv, mask, dout, lse, delta, jnp.zeros_like(q), jnp.zeros_like(kv))
    else:
        dq, dkv, dtable_RN = kernel.backward_biased(q, kv, mask, dout, lse, delta, position_bias)
        dbias = dataclasses.replace(position_bias, table_RN=dtable_RN)
    return kernel.join_queries(dq, sizes.T), *kernel.join_keys(dkv, sizes.S), dsinks_N, dbias, None


_attend.defvjp(_attend_forward, _attend_backward)


def sizes_of(q_BTNH: jax.Array, k_BSKH: jax.Array) -> Sizes:
    """The `Sizes` of these arrays."""
    return Sizes(q_BTNH.shape[1], *k_BSKH.shape[1:3])


def initial_softmax(
    kernel: Kernel, sizes: Sizes, q_BTNH: jax.Array, sinks_N: jax.Array | None, dtype: jnp.dtype
) -> Softmax:
    """The softmax before any key: empty, or the sinks alone. `dtype` is the dtype of the output accumulator."""
    B, T, N, _ = q_BTNH.shape
    scores_N = jnp.full((N,), EMPTY_LSE) if sinks_N is None else sinks_N
    lse_BTN = jnp.broadcast_to(scores_N.astype(jnp.float32)[None, None], (B, T, N))
    out = jnp.zeros(jax.eval_shape(lambda x: kernel.cut_queries(x, sizes.K), q_BTNH).shape, dtype)
    return out, _cut_rows(kernel, sizes, lse_BTN)


def with_remat_names(out_BTNH: jax.Array, lse: KernelArray) -> tuple[jax.Array, KernelArray]:
    """Both arrays, marked with the names in `SAVED`, by which a remat policy can keep them."""
    return checkpoint_name(out_BTNH, SAVED[0]), checkpoint_name(lse, SAVED[1])


def output_gradients(
    kernel: Kernel, sizes: Sizes, out_BTNH: jax.Array, dout_BTNH: jax.Array
) -> tuple[KernelArray, KernelArray]:
    """The output gradient dout and delta = sum_H(dout * out), in the layout of the kernel, for its backward pass.

    delta is the term that the softmax subtracts in the gradient of its scores (FlashAttention: Dao et al. 2022).
    """
    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    return kernel.cut_queries(dout_BTNH, sizes.K), _cut_rows(kernel, sizes, delta_BTN)


def sinks_gradient(
    kernel: Kernel, sizes: Sizes, sinks_N: jax.Array | None, lse: KernelArray, delta: KernelArray
) -> jax.Array | None:
    """The gradient of sinks_N; `lse` includes the sinks."""
    if sinks_N is None:
        return None
    lse_BTN, delta_BTN = (kernel.join_queries(x[..., None], sizes.T)[..., 0] for x in (lse, delta))
    # A sink has the softmax weight exp(sink - lse). It has no value, so the gradient of its score is -weight * delta.
    weights_BTN = jnp.exp(sinks_N.astype(jnp.float32)[None, None] - lse_BTN)
    return -jnp.sum(weights_BTN * delta_BTN, axis=(0, 1)).astype(sinks_N.dtype)


def _cut_rows(kernel: Kernel, sizes: Sizes, x_BTN: jax.Array) -> KernelArray:
    """x_BTN in the layout of the kernel: the layout of queries without the last dimension."""
    return kernel.cut_queries(x_BTN[..., None], sizes.K)[..., 0]
