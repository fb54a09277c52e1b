"""Ulysses (Jacobs et al. 2023): devices that share a sequence trade their part of it for a part of the heads.

Each device then attends for its heads over the tokens of the whole group, and trades back. The work of a device does
not depend on how long which document is. Key/value heads that are too few to be dealt out are repeated first, no more
often than it takes for every device to have those of its queries.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.ops.attention.mask import Mask

TOKENS, HEADS = 1, 2  # dimensions of x_BTNH


@dataclasses.dataclass(frozen=True)
class Groups:
    """The devices along a manual mesh axis in groups of `size` neighbours; the axis has `count` such groups."""

    axis: str
    size: int
    count: int = 1

    @property
    def indices(self) -> list[list[int]]:
        """The devices of each group."""
        return [list(range(i * self.size, (i + 1) * self.size)) for i in range(self.count)]


def attend(
    inner: Callable[..., jax.Array],
    groups: Groups,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """out_BTNH of this device's queries; N must be a multiple of the size of a group.

    `inner(q, k, v, mask, sinks_N)` is given all tokens of the group and this device's heads. `mask` is handed on.
    """
    N, K, size = q_BTNH.shape[HEADS], k_BSKH.shape[HEADS], groups.size
    swap = functools.partial(
        jax.lax.all_to_all, axis_name=groups.axis, tiled=True, axis_index_groups=groups.indices
    )
    copies = repeats(N, K, size)
    kv_2BSKH = jnp.repeat(jnp.stack([k_BSKH, v_BSKH]), copies, axis=HEADS + 1)
    q_BTNH = swap(q_BTNH, split_axis=HEADS, concat_axis=TOKENS)
    k_BSKH, v_BSKH = swap(kv_2BSKH, split_axis=HEADS + 1, concat_axis=TOKENS + 1)
    if sinks_N is not None:
        place = jax.lax.axis_index(groups.axis) % size
        sinks_N = jax.lax.dynamic_slice_in_dim(sinks_N, place * (N // size), N // size)
    out_BTNH = inner(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)
    return swap(out_BTNH, split_axis=TOKENS, concat_axis=HEADS)


def repeats(N: int, K: int, size: int) -> int:
    """How often each of K key/value heads is repeated, so that each device gets the heads of its N / size queries."""
    group = N // K
    return group // math.gcd(group, N // size)
