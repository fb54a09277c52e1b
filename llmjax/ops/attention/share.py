"""Attention on the devices that share a sequence: a kernel of `KERNELS`, brought to all keys by one of `ALGORITHMS`.

gather   keys and values of the whole sequence come to every device
ring     they travel around (`ring`), hidden behind the kernel
ulysses  devices trade tokens for heads and back (`ulysses`)
hybrid   ulysses among neighbours, a ring of such groups around it (USP: Fang and Zhao 2024)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.ops.attention import full, kernel, ring, ulysses
from llmjax.ops.attention.blockwise import Blockwise
from llmjax.ops.attention.kernel import Kernel
from llmjax.ops.attention.mask import Mask
from llmjax.ops.attention.pallas_gpu import PallasGPU
from llmjax.ops.attention.pallas_tpu import PallasTPU

Attend = Callable[..., jax.Array]  # (q_BTNH, k_BSKH, v_BSKH, mask, *, softcap, sinks_N) -> out_BTNH

KERNELS: dict[str, Callable[[float], Kernel]] = {
    "blockwise": Blockwise,
    "pallas_gpu": PallasGPU,
    "pallas_tpu": PallasTPU,
}
ALGORITHMS = ("gather", "ring", "ulysses", "hybrid")


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How `size` devices along the manual mesh axis `axis` share a sequence, contiguous parts of it.

    ulysses  devices in a group that trades heads: 1 for a ring or gathered keys, `size` for Ulysses alone
    others   further mesh axes that split the batch
    """

    algorithm: str
    axis: str
    size: int
    ulysses: int = 1
    others: tuple[str, ...] = ()

    @property
    def chunks(self) -> int:
        """Parts of a sequence whose queries and keys meet part by part."""
        return self.size // self.ulysses

    def describe(self) -> str:
        """The algorithm in words."""
        hybrid = f"hybrid, a ring of {self.chunks} groups of {self.ulysses}"
        return hybrid if self.algorithm == "hybrid" else self.algorithm


def make_attend(kernel_name: str, sharing: Sharing | None = None) -> Attend:
    """`attend(q_BTNH, k_BSKH, v_BSKH, mask, *, softcap, sinks_N)` of one device, equal to `full.attend` of the whole.

    kernel_name  of KERNELS, or `full`, the reference, which no ring can use
    sharing      None: all tokens lie on this device. Otherwise q, k and v are this device's part, within
                 `jax.shard_map`, while `mask` is always that of the whole sequence
    """
    make_kernel = None if kernel_name == "full" else KERNELS[kernel_name]

    def attend(
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask,
        *,
        softcap: float = 0.0,
        sinks_N: jax.Array | None = None,
    ) -> jax.Array:
        def alone(q, k, v, mask, sinks_N):
            if make_kernel is None:
                return full.attend(q, k, v, mask, softcap=softcap, sinks_N=sinks_N)
            return kernel.attend(make_kernel(softcap), q, k, v, mask, sinks_N)

        arrays = q_BTNH, k_BSKH, v_BSKH, mask, sinks_N
        if sharing is None:
            return alone(*arrays)
        if sharing.algorithm == "gather":
            return gather(alone, sharing.axis, *arrays)
        inner = alone
        if sharing.chunks > 1:
            devices = ring.Ring(sharing.axis, sharing.chunks, sharing.ulysses, sharing.others)
            inner = functools.partial(ring.attend, make_kernel(softcap), devices)
        if sharing.ulysses > 1:
            inner = functools.partial(
                ulysses.attend, inner, ulysses.Groups(sharing.axis, sharing.ulysses, sharing.chunks)
            )
        return inner(*arrays)

    return attend


def gather(
    alone: Callable[..., jax.Array],
    axis: str,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """`alone(q, k, v, mask, sinks_N)` of this device's queries and all keys."""
    kv_2BSKH = jax.lax.all_gather(jnp.stack([k_BSKH, v_BSKH]), axis, axis=2, tiled=True)
    T = q_BTNH.shape[1]
    part = mask.part(jax.lax.axis_index(axis) * T, T, 0, kv_2BSKH.shape[2])
    return alone(q_BTNH, *kv_2BSKH, part, sinks_N)
