"""Ring attention (Liu et al. 2023): queries stay, keys and values travel around the devices that share a sequence.

Keys go both ways at once and meet in the middle, so that n devices make n - 1 hops, each over one link; while a
device computes with the keys at hand, the next ones arrive. The backward pass sends them around once more, the
gradients that were summed so far one step behind, and from the last stop straight home. Keys and values are one
array. Who is needed by whom is read from segments and positions, which every device has of the whole sequence: hops
that no device needs are not made.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.ops.attention.kernel import (
    Cut,
    Kernel,
    Sizes,
    Softmax,
    begin,
    named,
    pulled,
    sinks_gradient,
    sizes_of,
)
from llmjax.ops.attention.mask import Mask, Span, block_spans

Reach = tuple[int, int]  # how many devices keys travel forwards, and backwards
Signs = tuple[int, ...]  # directions: 1 forwards, -1 backwards
Lanes = dict[int, Any]  # what travels, by its direction
SPANS = 32  # pieces of a device's tokens that are looked at apart to decide which hops are needed


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along a manual mesh axis, or every `stride`-th of them, as a ring of `size`.

    axis    name of the mesh axis, which has size * stride devices; those of one ring are `stride` apart
    others  the further mesh axes that split the batch: all devices of the mesh make the same hops
    """

    axis: str
    size: int
    stride: int = 1
    others: tuple[str, ...] = ()

    def index(self) -> jax.Array:
        """This device's place in its ring."""
        return jax.lax.axis_index(self.axis) // self.stride

    def hop(self, x: jax.Array, by: int) -> jax.Array:
        """x of the device `by` places before this one."""
        count = self.size * self.stride
        return jax.lax.ppermute(x, self.axis, [(i, (i + by * self.stride) % count) for i in range(count)])

    @property
    def reaches(self) -> list[Reach]:
        """The journeys that there are programs for, each a part of the next; the last one passes every device."""
        whole = self.size // 2, (self.size - 1) // 2
        near = [(0, 0), (1, 0), *((2**i, 2**i) for i in range(self.size.bit_length()))]
        return [r for r in near if r[0] <= whole[0] and r[1] <= whole[1] and r != whole] + [whole]


def attend(
    kernel: Kernel,
    ring: Ring,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """out_BTNH of this device's queries, in the dtype of q, equal to `full.attend` of the whole sequence.

    Within `jax.shard_map`: q, k and v are this device's part, `mask` is that of all queries and all keys of the
    ring in the order of its devices. Any order of tokens is right; which is cheap depends on it.
    """
    return _attend(kernel, ring, sizes_of(q_BTNH, k_BSKH), q_BTNH, k_BSKH, v_BSKH, sinks_N, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(kernel, ring, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask):
    return _attend_forward(kernel, ring, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask)[0]


def _attend_forward(kernel, ring, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask):
    q, kv = kernel.cut_queries(q_BTNH, sizes.K), kernel.cut_keys(k_BSKH, v_BSKH)
    softmax = begin(kernel, sizes, q_BTNH, sinks_N, jnp.float32)
    journeys = [functools.partial(_forward, kernel, ring, sizes, reach) for reach in ring.reaches]
    out, lse = jax.lax.switch(needed_reach(ring, sizes, mask), journeys, q, kv, mask, softmax)
    out_BTNH, lse = named(kernel.join_queries(out, sizes.T).astype(q.dtype), lse)
    return out_BTNH, (q, kv, sinks_N, mask, out_BTNH, lse)


def _attend_backward(kernel, ring, sizes, saved, dout_BTNH):
    q, kv, sinks_N, mask, out_BTNH, lse = saved
    dout, delta = pulled(kernel, sizes, out_BTNH, dout_BTNH)
    journeys = [functools.partial(_backward, kernel, ring, sizes, reach) for reach in ring.reaches]
    dq, dkv = jax.lax.switch(needed_reach(ring, sizes, mask), journeys, q, kv, mask, dout, lse, delta)
    dsinks_N = sinks_gradient(kernel, sizes, sinks_N, lse, delta)
    dq_BTNH = kernel.join_queries(dq.astype(q.dtype), sizes.T)
    return dq_BTNH, *kernel.join_keys(dkv, sizes.S), dsinks_N, None


_attend.defvjp(_attend_forward, _attend_backward)


def needed_reach(ring: Ring, sizes: Sizes, mask: Mask) -> jax.Array:
    """int32 [], the number in `ring.reaches` of the shortest journey that brings every device all that it needs."""
    n = ring.size

    def spans(segments_BX: jax.Array, positions_BX: jax.Array, length: int) -> Span:
        size = next(s for s in range(-(-length // SPANS), length + 1) if length % s == 0)
        return block_spans(segments_BX, positions_BX, size)

    q = spans(mask.q_segments_BT, mask.q_positions_BT, sizes.T)
    k = spans(mask.k_segments_BS, mask.k_positions_BS, sizes.S)
    needed = mask.may_see(Span(*(x[:, :, None] for x in q)), Span(*(x[:, None] for x in k)))
    needed_nn = needed.reshape(-1, n, q[0].shape[1] // n, n, k[0].shape[1] // n).any((0, 2, 4))
    before_nn = (jnp.arange(n)[:, None] - jnp.arange(n)[None]) % n
    enough = jnp.stack([
        jnp.all(~needed_nn | (before_nn <= ahead) | (n - before_nn <= back)) for ahead, back in ring.reaches
    ])  # fmt: skip
    number = jnp.argmax(enough).astype(jnp.int32)
    return jax.lax.pmax(number, ring.others) if ring.others else number


def _forward(
    kernel: Kernel, ring: Ring, sizes: Sizes, reach: Reach, q: Cut, kv: Cut, mask: Mask, softmax: Softmax
) -> Softmax:
    def step(s: jax.Array | int, carry: tuple[Lanes, Softmax], onwards: Signs) -> tuple[Lanes, Softmax]:
        lanes, softmax = carry
        nexts = {sign: ring.hop(lanes[sign], sign) for sign in onwards}
        for sign, kv in lanes.items():
            softmax = kernel.forward(q, kv, _part(ring, sizes, mask, sign * s), softmax)
        return nexts, softmax

    lanes = {sign: ring.hop(kv, sign) for sign in _onwards(reach, 0)}
    softmax = kernel.forward(q, kv, _part(ring, sizes, mask, 0), softmax)
    return _walk(reach, step, (lanes, softmax))[1]


def _backward(
    kernel: Kernel, ring: Ring, sizes: Sizes, reach: Reach,
    q: Cut, kv: Cut, mask: Mask, dout: Cut, lse: Cut, delta: Cut,
) -> tuple[Cut, Cut]:  # fmt: skip
    def add(kv: Cut, by: jax.Array | int, dq: Cut, dkv: Cut) -> tuple[Cut, Cut]:
        return kernel.backward(q, kv, _part(ring, sizes, mask, by), dout, lse, delta, dq, dkv)

    def step(s: jax.Array | int, carry: tuple[Lanes, Cut, Cut], onwards: Signs) -> tuple[Lanes, Cut, Cut]:
        lanes, dq, own = carry
        nexts = {sign: ring.hop(lanes[sign][0], sign) for sign in onwards}
        for sign, (kv, dkv) in lanes.items():
            arrived = jnp.zeros_like(kv) if dkv is None else ring.hop(dkv, sign)
            dq, dkv = add(kv, sign * s, dq, arrived)
            if sign in onwards:
                nexts[sign] = nexts[sign], dkv
            else:
                own += ring.hop(dkv, -sign * s).astype(jnp.float32)
        return nexts, dq, own

    lanes = {sign: (ring.hop(kv, sign), None) for sign in _onwards(reach, 0)}
    dq, own = (jnp.zeros(x.shape, jnp.float32) for x in (q, kv))
    dq, own = add(kv, 0, dq, own)
    _, dq, own = _walk(reach, step, (lanes, dq, own))
    return dq, own.astype(kv.dtype)


def _part(ring: Ring, sizes: Sizes, mask: Mask, by: jax.Array | int) -> Mask:
    """The mask of this device's queries and the keys of the device `by` places before it."""
    me = ring.index()
    return mask.part(me * sizes.T, sizes.T, (me - by) % ring.size * sizes.S, sizes.S)


def _onwards(reach: Reach, s: int) -> Signs:
    """The directions in which keys go on after step s."""
    return tuple(sign for sign, far in zip((1, -1), reach) if far > s)


def _walk(reach: Reach, step: Callable[..., Any], carry: Any) -> Any:
    """`carry = step(s, carry, onwards)` for each s from 1 to the longer reach; a loop where many steps are alike."""
    steps = range(1, max(reach) + 1)
    for (_, onwards), alike in itertools.groupby(steps, lambda s: (s == 1, _onwards(reach, s))):
        first, *more = alike
        if len(more) > 1:
            turn = functools.partial(step, onwards=onwards)
            carry = jax.lax.fori_loop(first, more[-1] + 1, turn, carry)
        else:
            for s in (first, *more):
                carry = step(s, carry, onwards)
    return carry
