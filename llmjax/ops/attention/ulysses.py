"""Ulysses sequence parallelism (Jacobs et al. 2023): devices that share a sequence exchange tokens for heads.

After an all-to-all, each device has all tokens of its group for a part of the heads. It computes attention for these
heads and a second all-to-all restores the original split. The work of a device does not depend on document lengths.
If there are fewer key/value heads than devices, they are repeated first, as few times as give every device the
key/value heads of its query heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.ops.attention.mask import Mask
from llmjax.ops.position_bias import PositionBias

# The indices of these dimensions in x_BTNH.
TOKENS, HEADS = 1, 2


@dataclasses.dataclass(frozen=True)
class Groups:
    """The devices along a manual mesh axis in `count` groups of `size` neighbours."""

    axis: str
    size: int
    count: int = 1

    @property
    def indices(self) -> list[list[int]]:
        """The indices of the devices in each group."""
        return [list(range(i * self.size, (i + 1) * self.size)) for i in range(self.count)]


def attend(
    inner: Callable[..., jax.Array],
    groups: Groups,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    sinks_N: jax.Array | None = None,
    position_bias: PositionBias | None = None,
) -> jax.Array:
    """out_BTNH for this device's queries. N must be a multiple of the group size.

    `inner(q, k, v, mask, sinks_N, position_bias)` is attention over all tokens of the group, for this device's heads.
    `mask` is passed on to it.
    """
    N, K, size = q_BTNH.shape[HEADS], k_BSKH.shape[HEADS], groups.size
    swap = functools.partial(
        jax.lax.all_to_all, axis_name=groups.axis, tiled=True, axis_index_groups=groups.indices
    )
    copies = repeats(N, K, size)
    # Keys and values travel as one array: one collective instead of two.
    kv_2BSKH = jnp.repeat(jnp.stack([k_BSKH, v_BSKH]), copies, axis=HEADS + 1)
    q_BTNH = swap(q_BTNH, split_axis=HEADS, concat_axis=TOKENS)
    k_BSKH, v_BSKH = swap(kv_2BSKH, split_axis=HEADS + 1, concat_axis=TOKENS + 1)
    # Sinks and biases belong to heads, and this device keeps those of its heads.
    first = jax.lax.axis_index(groups.axis) % size * (N // size)
    if sinks_N is not None:
        sinks_N = jax.lax.dynamic_slice_in_dim(sinks_N, first, N // size)
    if position_bias is not None:
        position_bias = position_bias.part(first, N // size)
    out_BTNH = inner(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, position_bias)
    return swap(out_BTNH, split_axis=TOKENS, concat_axis=HEADS)


def repeats(N: int, K: int, size: int) -> int:
    """How many times each of K key/value heads is repeated, so that each of `size` devices has the ones that its N /
    size query heads read."""
    group = N // K
    return group // math.gcd(group, N // size)
