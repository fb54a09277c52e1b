"""Ring attention (Liu et al. 2023): queries stay, keys and values travel around the devices that share a sequence.

Keys travel in both directions at once and meet on the opposite side, so n devices need n - 1 hops in total, each over
one link. While a device computes with the keys it has, the next ones arrive. The backward pass sends the keys around
again; the partial sums of their gradients follow one step behind, and from the last device they go straight back to
their owner. Keys and values travel as one array. Every device knows segments and positions of the whole sequence,
computes from them which keys any device needs, and the hops that no device needs are left out.
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
    Kernel,
    KernelArray,
    Sizes,
    Softmax,
    initial_softmax,
    output_gradients,
    sinks_gradient,
    sizes_of,
    with_remat_names,
)
from llmjax.ops.attention.mask import Mask, Span, block_spans

# The number of devices that keys travel forwards and backwards.
Reach = tuple[int, int]
# Directions around the ring: 1 is forwards, -1 is backwards.
Signs = tuple[int, ...]
# The arrays that are under way, by direction.
Travelling = dict[int, Any]
# With at most this many keys per device, a hop may take longer than a kernel; then both directions are used at once
# in the backward pass. With more keys, one direction after the other hides behind the kernels and takes half the
# memory.
SHORT_KEYS = 4096
# The number of pieces of a device's tokens whose spans decide which hops are needed. A choice: more pieces are more
# exact and compare more spans.
SPANS_PER_DEVICE = 32


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along a manual mesh axis, or every `stride`-th of them, as a ring of `size` devices.

    axis    the mesh axis, which has size * stride devices; the devices of one ring are `stride` apart
    others  the other mesh axes that split the batch; their devices must make the same hops
    """

    axis: str
    size: int
    stride: int = 1
    others: tuple[str, ...] = ()

    def index(self) -> jax.Array:
        """The index of this device in its ring."""
        return jax.lax.axis_index(self.axis) // self.stride

    def hop(self, x: jax.Array, by: int) -> jax.Array:
        """The x of the device `by` places before this one."""
        count = self.size * self.stride
        return jax.lax.ppermute(x, self.axis, [(i, (i + by * self.stride) % count) for i in range(count)])

    @property
    def reaches(self) -> list[Reach]:
        """The reaches that programs are compiled for, from the shortest to the longest, which passes every device.

        The reach is data-dependent, and `lax.switch` picks the program. Powers of two keep their number logarithmic.
        """
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
    """out_BTNH for this device's queries, in the dtype of q, equal to `full.attend` of the whole sequence.

    Called inside `jax.shard_map`. q, k and v are this device's part; `mask` covers all queries and keys of the ring,
    in the order of its devices. The result is right for any order of tokens; the cost depends on the order.
    """
    return _attend(kernel, ring, sizes_of(q_BTNH, k_BSKH), q_BTNH, k_BSKH, v_BSKH, sinks_N, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(kernel, ring, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask):
    return _attend_forward(kernel, ring, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask)[0]


def _attend_forward(kernel, ring, sizes, q_BTNH, k_BSKH, v_BSKH, sinks_N, mask):
    q, kv = kernel.cut_queries(q_BTNH, sizes.K), kernel.cut_keys(k_BSKH, v_BSKH)
    # The accumulator stays float32 around the whole ring and is rounded once.
    softmax = initial_softmax(kernel, sizes, q_BTNH, sinks_N, jnp.float32)
    programs = [functools.partial(_forward, kernel, ring, sizes, reach) for reach in ring.reaches]
    out, lse = jax.lax.switch(needed_reach(ring, sizes, mask), programs, q, kv, mask, softmax)
    out_BTNH, lse = with_remat_names(kernel.join_queries(out, sizes.T).astype(q.dtype), lse)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, sinks_N, mask, out_BTNH, lse)


def _attend_backward(kernel, ring, sizes, saved, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, mask, out_BTNH, lse = saved
    # The barrier makes the backward pass send keys around by itself. Without it XLA may keep the keys of the forward
    # pass.
    dout_BTNH, out_BTNH, q_BTNH = jax.lax.optimization_barrier((dout_BTNH, out_BTNH, q_BTNH))
    dout, delta = output_gradients(kernel, sizes, out_BTNH, dout_BTNH)
    dsinks_N = sinks_gradient(kernel, sizes, sinks_N, lse, delta)
    q = kernel.cut_queries(q_BTNH, sizes.K)
    programs = [functools.partial(_backward, kernel, ring, sizes, reach) for reach in ring.reaches]
    arrays = q, k_BSKH, v_BSKH, mask, dout, lse, delta
    dq, dkv = jax.lax.switch(needed_reach(ring, sizes, mask), programs, *arrays)
    return kernel.join_queries(dq.astype(q.dtype), sizes.T), *kernel.join_keys(dkv, sizes.S), dsinks_N, None


_attend.defvjp(_attend_forward, _attend_backward)


def needed_reach(ring: Ring, sizes: Sizes, mask: Mask) -> jax.Array:
    """int32 [], the index in `ring.reaches` of the shortest reach that brings every device all keys it needs."""
    n = ring.size

    def spans(segments_BX: jax.Array, positions_BX: jax.Array, length: int) -> Span:
        size = -(-length // SPANS_PER_DEVICE)
        segments, positions = (x.reshape(-1, length) for x in (segments_BX, positions_BX))
        found = block_spans(segments, positions, size)
        return Span(*(x.reshape(segments_BX.shape[0], -1) for x in found))

    q = spans(mask.q_segments_BT, mask.q_positions_BT, sizes.T)
    k = spans(mask.k_segments_BS, mask.k_positions_BS, sizes.S)
    needed = mask.may_see(Span(*(x[:, :, None] for x in q)), Span(*(x[:, None] for x in k)))
    # [d, e]: whether any query of device d may see any key of device e, in any batch row.
    needed_nn = needed.reshape(-1, n, q[0].shape[1] // n, n, k[0].shape[1] // n).any((0, 2, 4))
    # Keys of device e are at device d after (d - e) % n hops forwards, or n minus that backwards.
    before_nn = (jnp.arange(n)[:, None] - jnp.arange(n)[None]) % n
    enough = jnp.stack([
        jnp.all(~needed_nn | (before_nn <= ahead) | (n - before_nn <= back)) for ahead, back in ring.reaches
    ])  # fmt: skip
    number = jnp.argmax(enough).astype(jnp.int32)
    # A collective in a program that only some devices run would hang, so devices of the other axes agree on the
    # longest.
    return jax.lax.pmax(number, ring.others) if ring.others else number


@dataclasses.dataclass(frozen=True)
class RingStep:
    """One step of the ring, between two barriers.

    distance  how many devices the keys at hand have travelled; 0 means the device's own keys
    attend    the directions from which keys are at hand for attention in this step
    send      the directions in which keys travel on (or start) during this step
    """

    distance: jax.Array | int
    attend: Signs
    send: Signs


def ring_steps(reach: Reach, at_once: bool) -> list[RingStep]:
    """The steps of the ring. Keys travel in both directions at once if `at_once`, otherwise first forwards, then
    backwards."""
    far = dict(zip((1, -1), reach))
    signs = tuple(sign for sign in far if far[sign])
    trips = [signs] if at_once and signs else [(sign,) for sign in signs]
    found = [RingStep(0, (), ())]
    for trip in trips:
        found[-1] = dataclasses.replace(found[-1], send=trip)
        for s in range(1, max(far[sign] for sign in trip) + 1):
            attend, send = (tuple(sign for sign in trip if far[sign] >= least) for least in (s, s + 1))
            found.append(RingStep(s, attend, send))
    return found


def _run_steps(journey: list[RingStep], run_step: Callable[[RingStep, Any], Any], carry: Any) -> Any:
    """Calls `carry = run_step(step, carry)` for each step. Steps that differ only in distance become one loop."""
    # The first two distances stay outside of loops: the carry of a loop must have the same structure in every step.
    for (_, attend, send), alike in itertools.groupby(journey, lambda m: (m.distance < 2, m.attend, m.send)):
        first, *more = alike
        if len(more) < 2:
            for ring_step in (first, *more):
                carry = run_step(ring_step, carry)
        else:
            at = functools.partial(RingStep, attend=attend, send=send)
            again = functools.partial(lambda at, s, carry: run_step(at(s), carry), at)
            carry = jax.lax.fori_loop(first.distance, more[-1].distance + 1, again, carry)
    return carry


def _forward(
    kernel: Kernel,
    ring: Ring,
    sizes: Sizes,
    reach: Reach,
    q: KernelArray,
    kv: KernelArray,
    mask: Mask,
    softmax: Softmax,
) -> Softmax:
    """`softmax` after all keys within `reach` have been merged into it."""

    def run_step(now: RingStep, carry: tuple[Travelling, Softmax]) -> tuple[Travelling, Softmax]:
        travelling, softmax = carry
        nexts = {sign: ring.hop(travelling.get(sign, kv), sign) for sign in now.send}
        for sign, keys in travelling.items() if now.attend else [(0, kv)]:
            softmax = kernel.forward(q, keys, _part(ring, sizes, mask, sign * now.distance), softmax)
        # The barrier ends the step: the hop and the kernel of a step run together, and the next hop cannot start
        # early, which would hold the keys of several steps at once.
        return jax.lax.optimization_barrier((nexts, softmax))

    return _run_steps(ring_steps(reach, at_once=True), run_step, ({}, softmax))[1]


def _backward(
    kernel: Kernel, ring: Ring, sizes: Sizes, reach: Reach, q: KernelArray, k_BSKH: jax.Array, v_BSKH: jax.Array,
    mask: Mask, dout: KernelArray, lse: KernelArray, delta: KernelArray,
) -> tuple[KernelArray, KernelArray]:  # fmt: skip
    """dq in float32, and dkv.

    Each hop runs during a kernel: gradients travel while dq is computed, and keys while dkv is computed. Thus a step
    has two halves with a barrier between them.
    """

    def own_keys(after: KernelArray) -> KernelArray:
        """This device's keys in the layout of the kernel, made anew after `after`, so that they are not held all the
        time."""
        k, v, _ = jax.lax.optimization_barrier((k_BSKH, v_BSKH, after))
        return kernel.cut_keys(k, v)

    def add_dq(keys: KernelArray, by: jax.Array | int, dq: KernelArray) -> KernelArray:
        part = _part(ring, sizes, mask, by)
        added, _ = kernel.backward(q, keys, part, dout, lse, delta, dq, None)
        assert added is not None
        return added

    def add_dkv(keys: KernelArray, by: jax.Array | int, dkv: KernelArray) -> KernelArray:
        part = _part(ring, sizes, mask, by)
        _, added = kernel.backward(q, keys, part, dout, lse, delta, None, dkv)
        assert added is not None
        return added

    def send_home(own: KernelArray | None, grads: Travelling) -> KernelArray | None:
        """Sends gradients from the last device of their direction back to their owner, and adds them to `own`."""
        for sign, dkv in grads.items():
            back = ring.hop(dkv, -sign * reach[sign < 0])
            own = back if own is None else _sum(own, back)
        return own

    def run_step(
        now: RingStep, carry: tuple[Travelling, Travelling, KernelArray, KernelArray | None]
    ) -> tuple[Travelling, Travelling, KernelArray, KernelArray | None]:
        travelling, grads, dq, own = carry
        own = send_home(own, {sign: dkv for sign, dkv in grads.items() if sign not in now.attend})
        arrived = {sign: ring.hop(dkv, sign) for sign, dkv in grads.items() if sign in now.attend}
        for sign, keys in travelling.items():
            dq = add_dq(keys, sign * now.distance, dq)
        travelling, arrived, dq, own = jax.lax.optimization_barrier((travelling, arrived, dq, own))
        nexts = {
            sign: ring.hop(travelling[sign] if sign in travelling else own_keys(dq), sign)
            for sign in now.send
        }
        grads = {}
        for sign, keys in travelling.items():
            dkv = arrived.get(sign, jnp.zeros_like(keys))
            grads[sign] = add_dkv(keys, sign * now.distance, dkv)
        return jax.lax.optimization_barrier((nexts, grads, dq, own))

    # Step 0: own keys start to travel while dq is computed with them. Their dkv is computed at the very end, while
    # the last gradients travel home.
    first, *journey = ring_steps(reach, at_once=sizes.S <= SHORT_KEYS)
    # A fresh 0: zeros shared with the forward pass would be computed there and kept until here.
    zero, _ = jax.lax.optimization_barrier((jnp.float32(0), dout))
    kv, dq = own_keys(dout), jnp.broadcast_to(zero, q.shape)
    travelling = {sign: ring.hop(kv, sign) for sign in first.send}
    travelling, dq = jax.lax.optimization_barrier((travelling, add_dq(kv, 0, dq)))
    _, grads, dq, own = _run_steps(journey, run_step, (travelling, {}, dq, None))
    back, kv = send_home(None, grads), own_keys(dq)
    own = add_dkv(kv, 0, jnp.zeros_like(kv) if own is None else own)
    return jax.lax.optimization_barrier((dq, own if back is None else _sum(own, back)))


def _sum(x: KernelArray, y: KernelArray) -> KernelArray:
    """x + y, computed in float32 and rounded to the dtype of x."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def _part(ring: Ring, sizes: Sizes, mask: Mask, by: jax.Array | int) -> Mask:
    """The mask between this device's queries and the keys of the device `by` places before it."""
    me = ring.index()
    return mask.part(me * sizes.T, sizes.T, (me - by) % ring.size * sizes.S, sizes.S)
