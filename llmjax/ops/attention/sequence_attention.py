"""Attention on the devices that share a sequence: a kernel of `KERNELS`, brought to all keys by one of `ALGORITHMS`.

gather   keys and values of the whole sequence come to every device
ring     they travel around (`ring`), hidden behind the kernel
ulysses  devices trade tokens for heads and back (`ulysses`)
hybrid   ulysses among neighbours, a ring of such groups around it (USP: Fang and Zhao 2024)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.errors import choose
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
OWN = {"cpu": "blockwise", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}  # platform -> the kernel made for it
# compute.kernel -> the kernel on each platform; "" stands for every other platform.
ATTENTION: dict[str, dict[str, str]] = {
    "auto": OWN,
    "full": {"": "full"},
    "blockwise": {"": "blockwise"},
    "pallas": {platform: name for platform, name in OWN.items() if name.startswith("pallas")},
}


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
        groups = f", a ring of {self.chunks} groups of {self.ulysses}"
        return self.algorithm + groups * (1 < self.ulysses < self.size)


def make_attend(kernel_name: str, sharing: Sharing | None = None) -> Attend:
    """`attend(q_BTNH, k_BSKH, v_BSKH, mask, *, softcap, sinks_N)` of one device, equal to `full.attend` of the whole.

    kernel_name  of KERNELS, or `full`, the reference, which no ring can use
    sharing      None: all tokens lie on this device. Otherwise q, k and v are this device's part, within
                 `jax.shard_map`, while `mask` always covers the whole sequence
    """
    if kernel_name != "full":
        choose(KERNELS, "kernel", kernel_name)
    bring = None if sharing is None else choose(ALGORITHMS, "mesh.seq_attention", sharing.algorithm)

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
            if kernel_name == "full":
                return full.attend(q, k, v, mask, softcap=softcap, sinks_N=sinks_N)
            return kernel.attend(KERNELS[kernel_name](softcap), q, k, v, mask, sinks_N)

        def around(*arrays):
            devices = ring.Ring(sharing.axis, sharing.chunks, sharing.ulysses, sharing.others)
            return ring.attend(KERNELS[kernel_name](softcap), devices, *arrays)

        arrays = q_BTNH, k_BSKH, v_BSKH, mask, sinks_N
        if bring is None or sharing is None:
            return alone(*arrays)
        return bring(sharing, alone, around, *arrays)

    return attend


# What brings a device's queries to all keys: (sharing, attend where all keys lie here, attend around the ring, arrays).
Inner = Callable[..., jax.Array]


def _gather(sharing: Sharing, alone: Inner, around: Inner, *arrays: Any) -> jax.Array:
    return gather(alone, sharing.axis, *arrays)


def _ring(sharing: Sharing, alone: Inner, around: Inner, *arrays: Any) -> jax.Array:
    return around(*arrays)


def _ulysses(sharing: Sharing, alone: Inner, around: Inner, *arrays: Any) -> jax.Array:
    return ulysses.attend(alone, ulysses.Groups(sharing.axis, sharing.ulysses, 1), *arrays)


def _hybrid(sharing: Sharing, alone: Inner, around: Inner, *arrays: Any) -> jax.Array:
    return ulysses.attend(around, ulysses.Groups(sharing.axis, sharing.ulysses, sharing.chunks), *arrays)


ALGORITHMS = {"gather": _gather, "ring": _ring, "ulysses": _ulysses, "hybrid": _hybrid}


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
