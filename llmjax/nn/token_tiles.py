"""Token-wise functions done tile by tile along T, so that what is wide exists for one tile at a time.

The backward pass does each tile anew. Each device walks through its own tokens, with weights that came to it whole
along the axes that split tokens, once for all tiles; and their gradients are summed on it over all tiles before they
are reduced, once. The compiler alone would do both in every tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.ops import chunks
from llmjax.parallel.mesh import AXES
from llmjax.parallel.rules import Layout, without_axes
from llmjax.types import Params

TOKEN_AXES = ("data", "fsdp", "seq")


def inner_layout(layout: Layout) -> Layout:
    """The layout that `fn` of `by_tiles` works in: all axes that split tokens are manual there."""
    if layout.mesh is None:
        return layout
    return dataclasses.replace(layout, manual=tuple({*layout.manual, *TOKEN_AXES}))


def by_tiles(
    fn: Callable[[Params, Any], Any],
    params: Params,
    specs: Any,
    arrays: Any,
    *,
    layout: Layout,
    tile: int,
    dtype: str,
) -> Any:
    """`fn(params, arrays)`, of params and arrays [B, T, ...]: a tree of arrays [B, T, ...].

    `fn` is token-wise, works in `inner_layout` and casts to `dtype` what `specs` (of the params) split over the mesh.
    A tile has at most `tile` tokens on each device; the last one may be filled up with zeros.
    """
    axes = tuple(axis for axis in TOKEN_AXES if layout.axis_size(axis) > 1)

    def walk(params: Params, arrays: Any) -> Any:
        params = jax.tree.map(functools.partial(_whole, axes, dtype), params, specs)
        B, T = jax.tree.leaves(arrays)[0].shape[:2]
        tiles = chunks.cut(T, tile // B)
        if tiles.count == 1:
            return jax.checkpoint(fn)(params, arrays)
        cut = jax.tree.map(lambda x: tiles.split(x, 1).swapaxes(0, 1), arrays)
        outs = jax.lax.map(jax.checkpoint(lambda part: fn(params, part)), cut)
        return jax.tree.map(lambda y: tiles.join(y.swapaxes(0, 1), 1), outs)

    if not axes:
        return walk(params, arrays)
    # Gradients are summed over devices in float32, also where an engine has cast the parameters before.
    params = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )
    elsewhere = tuple({*AXES} - {*axes})
    rows = tuple(axis for axis in axes if axis != "seq") or None
    tokens = PartitionSpec(rows, "seq" if "seq" in axes else None)
    return jax.shard_map(
        walk,
        mesh=None if layout.manual else layout.mesh,
        in_specs=(jax.tree.map(lambda spec: without_axes(spec, elsewhere), specs), tokens),
        out_specs=tokens,
        axis_names=set(axes),
        check_vma=False,
    )(params, arrays)


def _whole(axes: tuple[str, ...], dtype: str, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The parameter whole along the mesh axes `axes`, which split it as `spec` says."""
    for dim, entry in enumerate(spec):
        split = tuple(axis for axis in axes if axis in ((entry,) if isinstance(entry, str) else entry or ()))
        if split:
            return _gather(x, split, dim, dtype)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, axes: tuple[str, ...], dim: int, dtype: str) -> jax.Array:
    """Travels in `dtype` and arrives as float32, so that its gradient is summed over tiles and devices in float32."""
    return jax.lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True).astype(x.dtype)


def _gather_forward(x: jax.Array, axes: tuple[str, ...], dim: int, dtype: str) -> tuple[jax.Array, None]:
    return _gather(x, axes, dim, dtype), None


def _gather_backward(
    axes: tuple[str, ...], dim: int, dtype: str, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)
