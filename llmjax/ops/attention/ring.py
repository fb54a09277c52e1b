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
SHORT = 4096  # keys per device up to which hops may take longer than kernels: then both ways are gone at once
SPANS = 32  # pieces of a device's tokens that are looked at apart to decide which hops are needed


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along a manual mesh axis, or every `stride`-th of them, as a ring of `size`.

    axis    name of the mesh axis, which has size * stride devices; the devices of one ring are `stride` apart
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

    Within `jax.shard_map`: q, k and v are this device's part, `mask` covers all queries and all keys of the
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
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, sinks_N, mask, out_BTNH, lse)


def _attend_backward(kernel, ring, sizes, saved, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, mask, out_BTNH, lse = saved
    # A journey of its own: the keys of the forward pass are not kept for it.
    dout_BTNH, out_BTNH, q_BTNH = jax.lax.optimization_barrier((dout_BTNH, out_BTNH, q_BTNH))
    dout, delta = pulled(kernel, sizes, out_BTNH, dout_BTNH)
    dsinks_N = sinks_gradient(kernel, sizes, sinks_N, lse, delta)
    q = kernel.cut_queries(q_BTNH, sizes.K)
    journeys = [functools.partial(_backward, kernel, ring, sizes, reach) for reach in ring.reaches]
    arrays = q, k_BSKH, v_BSKH, mask, dout, lse, delta
    dq, dkv = jax.lax.switch(needed_reach(ring, sizes, mask), journeys, *arrays)
    return kernel.join_queries(dq.astype(q.dtype), sizes.T), *kernel.join_keys(dkv, sizes.S), dsinks_N, None


_attend.defvjp(_attend_forward, _attend_backward)


def needed_reach(ring: Ring, sizes: Sizes, mask: Mask) -> jax.Array:
    """int32 [], the number in `ring.reaches` of the shortest journey that brings every device all that it needs."""
    n = ring.size

    def spans(segments_BX: jax.Array, positions_BX: jax.Array, length: int) -> Span:
        size = -(-length // SPANS)
        segments, positions = (x.reshape(-1, length) for x in (segments_BX, positions_BX))
        found = block_spans(segments, positions, size)
        return Span(*(x.reshape(segments_BX.shape[0], -1) for x in found))

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


@dataclasses.dataclass(frozen=True)
class Moment:
    """Between two barriers: a device meets the keys of the devices `step` before it in the directions `meet` (step 0:
    its own), while those of the directions `hop` travel on, or start out."""

    step: jax.Array | int
    meet: Signs
    hop: Signs


def moments(reach: Reach, at_once: bool) -> list[Moment]:
    """The journey of the keys, in both directions at once, or first forwards and then backwards."""
    far = dict(zip((1, -1), reach))
    signs = tuple(sign for sign in far if far[sign])
    trips = [signs] if at_once and signs else [(sign,) for sign in signs]
    found = [Moment(0, (), ())]
    for trip in trips:
        found[-1] = dataclasses.replace(found[-1], hop=trip)
        for s in range(1, max(far[sign] for sign in trip) + 1):
            meet, hop = (tuple(sign for sign in trip if far[sign] >= least) for least in (s, s + 1))
            found.append(Moment(s, meet, hop))
    return found


def _through(journey: list[Moment], turn: Callable[[Moment, Any], Any], carry: Any) -> Any:
    """`carry = turn(moment, carry)` for each moment; a loop where many are alike but for their step."""
    for (_, meet, hop), alike in itertools.groupby(journey, lambda m: (m.step < 2, m.meet, m.hop)):
        first, *more = alike
        if len(more) < 2:
            for moment in (first, *more):
                carry = turn(moment, carry)
        else:
            at = functools.partial(Moment, meet=meet, hop=hop)
            again = functools.partial(lambda at, s, carry: turn(at(s), carry), at)
            carry = jax.lax.fori_loop(first.step, more[-1].step + 1, again, carry)
    return carry


def _forward(
    kernel: Kernel, ring: Ring, sizes: Sizes, reach: Reach, q: Cut, kv: Cut, mask: Mask, softmax: Softmax
) -> Softmax:
    def turn(now: Moment, carry: tuple[Lanes, Softmax]) -> tuple[Lanes, Softmax]:
        lanes, softmax = carry
        nexts = {sign: ring.hop(lanes.get(sign, kv), sign) for sign in now.hop}
        for sign, keys in lanes.items() if now.meet else [(0, kv)]:
            softmax = kernel.forward(q, keys, _part(ring, sizes, mask, sign * now.step), softmax)
        return jax.lax.optimization_barrier((nexts, softmax))

    return _through(moments(reach, at_once=True), turn, ({}, softmax))[1]


def _backward(
    kernel: Kernel, ring: Ring, sizes: Sizes, reach: Reach,
    q: Cut, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, dout: Cut, lse: Cut, delta: Cut,
) -> tuple[Cut, Cut]:  # fmt: skip
    """dq, float32, and dkv. Every hop has a kernel to hide behind: gradients travel while dq is computed, and keys
    while dkv is. This device's own keys are cut anew each time they are needed, so as not to be held all the while."""

    def own_keys(after: Cut) -> Cut:
        k, v, _ = jax.lax.optimization_barrier((k_BSKH, v_BSKH, after))
        return kernel.cut_keys(k, v)

    def add_dq(keys: Cut, by: jax.Array | int, dq: Cut) -> Cut:
        part = _part(ring, sizes, mask, by)
        added, _ = kernel.backward(q, keys, part, dout, lse, delta, dq, None)
        assert added is not None  # it was asked for
        return added

    def add_dkv(keys: Cut, by: jax.Array | int, dkv: Cut) -> Cut:
        part = _part(ring, sizes, mask, by)
        _, added = kernel.backward(q, keys, part, dout, lse, delta, None, dkv)
        assert added is not None  # it was asked for
        return added

    def home(own: Cut | None, grads: Lanes) -> Cut | None:
        for sign, dkv in grads.items():
            back = ring.hop(dkv, -sign * reach[sign < 0])
            own = back if own is None else _sum(own, back)
        return own

    def turn(
        now: Moment, carry: tuple[Lanes, Lanes, Cut, Cut | None]
    ) -> tuple[Lanes, Lanes, Cut, Cut | None]:
        lanes, grads, dq, own = carry
        own = home(own, {sign: dkv for sign, dkv in grads.items() if sign not in now.meet})
        arrived = {sign: ring.hop(dkv, sign) for sign, dkv in grads.items() if sign in now.meet}
        for sign, keys in lanes.items():
            dq = add_dq(keys, sign * now.step, dq)
        lanes, arrived, dq, own = jax.lax.optimization_barrier((lanes, arrived, dq, own))
        nexts = {sign: ring.hop(lanes[sign] if sign in lanes else own_keys(dq), sign) for sign in now.hop}
        grads = {}
        for sign, keys in lanes.items():
            dkv = arrived.get(sign, jnp.zeros_like(keys))
            grads[sign] = add_dkv(keys, sign * now.step, dkv)
        return jax.lax.optimization_barrier((nexts, grads, dq, own))

    first, *journey = moments(reach, at_once=sizes.S <= SHORT)
    zero, _ = jax.lax.optimization_barrier((jnp.float32(0), dout))  # not the zeros of the forward pass
    kv, dq = own_keys(dout), jnp.broadcast_to(zero, q.shape)
    lanes = {sign: ring.hop(kv, sign) for sign in first.hop}
    lanes, dq = jax.lax.optimization_barrier((lanes, add_dq(kv, 0, dq)))
    _, grads, dq, own = _through(journey, turn, (lanes, {}, dq, None))
    back, kv = home(None, grads), own_keys(dq)
    own = add_dkv(kv, 0, jnp.zeros_like(kv) if own is None else own)
    return jax.lax.optimization_barrier((dq, own if back is None else _sum(own, back)))


def _sum(x: Cut, y: Cut) -> Cut:
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def _part(ring: Ring, sizes: Sizes, mask: Mask, by: jax.Array | int) -> Mask:
    """The mask of this device's queries and the keys of the device `by` places before it."""
    me = ring.index()
    return mask.part(me * sizes.T, sizes.T, (me - by) % ring.size * sizes.S, sizes.S)
