"""Token-wise functions done tile by tile along T, so that what is wide exists for one tile at a time.

The backward pass does each tile anew. Each device walks through its own tokens, with weights that came to it whole
along the axes that split tokens, once for all tiles; and their gradients are summed on it over all tiles before they
are reduced, once. The compiler alone would do both in every tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.parallel.rules import Layout
from llmjax.types import Params

TOKEN_AXES = ("data", "fsdp", "seq")


def inner_layout(layout: Layout) -> Layout:
    """The layout that `fn` of `by_tiles` works in: all axes that split tokens are manual there."""
    if layout.mesh is None:
        return layout
    return dataclasses.replace(layout, manual=tuple({*layout.manual, *TOKEN_AXES}))


def by_tiles(fn: Callable[[Params, Any], Any], layout: Layout, tile: int, params: Params, arrays: Any) -> Any:
    """`fn(params, arrays)`, of float32 params and arrays [B, T, ...], a tree of arrays [B, T, ...].

    `fn` is token-wise, and works in `inner_layout`. A tile has at most `tile` tokens on each device.
    """

    def walk(params: Params, arrays: Any) -> Any:
        # Accumulated over tiles: float32, whatever the dtype in which weights come.
        params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
        B, T = jax.tree.leaves(arrays)[0].shape[:2]
        size = max(t for t in range(1, T + 1) if T % t == 0 and B * t <= max(tile, B))
        if size == T:
            return jax.checkpoint(fn)(params, arrays)
        cut = jax.tree.map(lambda x: x.reshape(B, T // size, size, *x.shape[2:]).swapaxes(0, 1), arrays)
        outs = jax.lax.map(jax.checkpoint(lambda part: fn(params, part)), cut)
        return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(B, T, *y.shape[3:]), outs)

    axes = tuple(axis for axis in TOKEN_AXES if layout.axis_size(axis) > 1)
    if not axes:
        return walk(params, arrays)
    rows = tuple(axis for axis in axes if axis != "seq") or None
    tokens = PartitionSpec(rows, "seq" if "seq" in axes else None)
    return jax.shard_map(
        walk,
        mesh=None if layout.manual else layout.mesh,
        in_specs=(PartitionSpec(), tokens),
        out_specs=tokens,
        axis_names=set(axes),
        check_vma=False,
    )(params, arrays)
