"""Attention on devices that share a sequence: a kernel of `KERNELS` and an algorithm of `ALGORITHMS`.

gather   every device collects the keys and values of the whole sequence
ring     keys and values travel around the devices while the kernel computes (`ring`)
ulysses  devices exchange tokens for heads and back (`ulysses`)
hybrid   Ulysses within groups of neighbours, and a ring of such groups (USP: Fang and Zhao 2024)
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
from llmjax.ops.attention.kernel import BiasedKernel, Kernel
from llmjax.ops.attention.mask import Mask
from llmjax.ops.position_bias import PositionBias

# attend(q_BTNH, k_BSKH, v_BSKH, mask, *, softcap, sinks_N, position_bias) -> out_BTNH
Attend = Callable[..., jax.Array]


# Pallas takes a third of a second to import, so that only those who use it do.
def _pallas_gpu(softcap: float) -> Kernel:
    from llmjax.ops.attention.pallas_gpu import PallasGPU

    return PallasGPU(softcap)


def _pallas_tpu(softcap: float) -> Kernel:
    from llmjax.ops.attention.pallas_tpu import PallasTPU

    return PallasTPU(softcap)


KERNELS: dict[str, Callable[[float], Kernel]] = {
    "blockwise": Blockwise,
    "pallas_gpu": _pallas_gpu,
    "pallas_tpu": _pallas_tpu,
}
# The kernel that compute.kernel=auto chooses on each platform.
BEST_KERNEL = {"cpu": "blockwise", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}
# The kernel on each platform, by the value of compute.kernel. "" stands for all platforms that are not listed. A kernel
# runs everywhere unless it is written in Pallas.
ATTENTION: dict[str, dict[str, str]] = {
    "auto": BEST_KERNEL,
    **{name: {"": name} for name in ("full", *KERNELS) if not name.startswith("pallas")},
    "pallas": {platform: name for platform, name in BEST_KERNEL.items() if name.startswith("pallas")},
}


def adds_bias(kernel_name: str) -> bool:
    """Whether the kernel, a name in KERNELS or `full`, can add a bias of positions to its scores."""
    return kernel_name == "full" or isinstance(KERNELS[kernel_name](0.0), BiasedKernel)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How the `size` devices along the manual mesh axis `axis` share a sequence. Each has a contiguous part of it.

    ulysses  the number of devices in a group that exchanges heads: 1 for `ring` and `gather`, `size` for `ulysses`
    others   the other mesh axes that split the batch
    """

    algorithm: str
    axis: str
    size: int
    ulysses: int = 1
    others: tuple[str, ...] = ()

    @property
    def chunks(self) -> int:
        """The number of parts of a sequence in the ring: the number of groups."""
        return self.size // self.ulysses

    def describe(self) -> str:
        """The algorithm, and the groups of `hybrid`, as text for the plan."""
        groups = f", a ring of {self.chunks} groups of {self.ulysses}"
        return self.algorithm + groups * (1 < self.ulysses < self.size)


def make_attend(kernel_name: str, sharing: Sharing | None = None) -> Attend:
    """Returns `attend(q_BTNH, k_BSKH, v_BSKH, mask, *, softcap, sinks_N, position_bias)` for one device, equal to
    `full.attend` of the whole. ValueError for a `position_bias` where the kernel cannot add one, or around a ring.

    kernel_name  a name in KERNELS, or `full`, the reference, which cannot be used in a ring
    sharing      None if all tokens lie on this device. Otherwise q, k and v are this device's part inside of
                 `jax.shard_map`, and `mask` covers the whole sequence
    """
    if kernel_name != "full":
        choose(KERNELS, "kernel", kernel_name)
    algorithm = None if sharing is None else choose(ALGORITHMS, "mesh.seq_attention", sharing.algorithm)

    def attend(
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask,
        *,
        softcap: float = 0.0,
        sinks_N: jax.Array | None = None,
        position_bias: PositionBias | None = None,
    ) -> jax.Array:
        if position_bias is not None and not adds_bias(kernel_name):
            raise ValueError(f"the kernel {kernel_name!r} adds no bias of positions")

        def attend_here(q, k, v, mask, sinks_N, position_bias):
            if kernel_name == "full":
                return full.attend(
                    q, k, v, mask, softcap=softcap, sinks_N=sinks_N, position_bias=position_bias
                )
            return kernel.attend(KERNELS[kernel_name](softcap), q, k, v, mask, sinks_N, position_bias)

        def attend_ring(*arrays):
            *arrays, position_bias = arrays
            if position_bias is not None:
                raise ValueError("a ring adds no bias of positions")
            devices = ring.Ring(sharing.axis, sharing.chunks, sharing.ulysses, sharing.others)
            return ring.attend(KERNELS[kernel_name](softcap), devices, *arrays)

        arrays = q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, position_bias
        if algorithm is None or sharing is None:
            return attend_here(*arrays)
        return algorithm(sharing, attend_here, attend_ring, *arrays)

    return attend


# Each algorithm is called with (sharing, attention over keys on this device, attention around the ring, *arrays).
Inner = Callable[..., jax.Array]


def _gather(sharing: Sharing, attend_here: Inner, attend_ring: Inner, *arrays: Any) -> jax.Array:
    return gather(attend_here, sharing.axis, *arrays)


def _ring(sharing: Sharing, attend_here: Inner, attend_ring: Inner, *arrays: Any) -> jax.Array:
    return attend_ring(*arrays)


def _ulysses(sharing: Sharing, attend_here: Inner, attend_ring: Inner, *arrays: Any) -> jax.Array:
    return ulysses.attend(attend_here, ulysses.Groups(sharing.axis, sharing.ulysses, 1), *arrays)


def _hybrid(sharing: Sharing, attend_here: Inner, attend_ring: Inner, *arrays: Any) -> jax.Array:
    return ulysses.attend(attend_ring, ulysses.Groups(sharing.axis, sharing.ulysses, sharing.chunks), *arrays)


ALGORITHMS = {"gather": _gather, "ring": _ring, "ulysses": _ulysses, "hybrid": _hybrid}


def gather(
    attend_here: Callable[..., jax.Array],
    axis: str,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    sinks_N: jax.Array | None,
    position_bias: PositionBias | None,
) -> jax.Array:
    """`attend_here(q, k, v, mask, sinks_N, position_bias)` for this device's queries and the keys of all devices."""
    # Keys and values travel as one array: one collective instead of two.
    kv_2BSKH = jax.lax.all_gather(jnp.stack([k_BSKH, v_BSKH]), axis, axis=2, tiled=True)
    T = q_BTNH.shape[1]
    part = mask.part(jax.lax.axis_index(axis) * T, T, 0, kv_2BSKH.shape[2])
    return attend_here(q_BTNH, *kv_2BSKH, part, sinks_N, position_bias)
