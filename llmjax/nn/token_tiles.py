"""Runs a token-wise function tile by tile along the sequence, so that wide arrays exist for one tile at a time.

The backward pass recomputes each tile. Each device loops over its own tokens. Weights that are split over the devices
that share the tokens are gathered once, before the loop, and their gradients are summed over all tiles and reduced
once, after it. The compiler by itself would do both in every tile.
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

# The mesh axes that split tokens.
TOKEN_AXES = ("data", "fsdp", "seq")


def inner_layout(layout: Layout) -> Layout:
    """The layout inside `by_tiles`: all axes that split tokens are manual there."""
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
    """`fn(params, arrays)`, computed tile by tile. `arrays` and the result are trees of arrays [B, T, ...].

    fn     a token-wise function that works in `inner_layout`
    specs  the PartitionSpecs of `params`
    tile   the most tokens of a tile on each device; the last tile may be padded with zeros
    dtype  split parameters are gathered in this dtype, and `fn` casts them to it
    """
    axes = tuple(axis for axis in TOKEN_AXES if layout.axis_size(axis) > 1)

    def run_tiles(params: Params, arrays: Any) -> Any:
        params = jax.tree.map(functools.partial(_gather_parameter, axes, dtype), params, specs)
        B, T = jax.tree.leaves(arrays)[0].shape[:2]
        tiles = chunks.cut(T, tile // B)
        if tiles.count == 1:
            # A single tile needs no loop. The backward pass recomputes it like any other.
            return jax.checkpoint(fn)(params, arrays)
        # `lax.map` loops over the first dimension: [B, T, ...] -> [tiles, B, size, ...].
        cut = jax.tree.map(lambda x: tiles.split(x, 1).swapaxes(0, 1), arrays)
        outs = jax.lax.map(jax.checkpoint(lambda part: fn(params, part)), cut)
        return jax.tree.map(lambda y: tiles.join(y.swapaxes(0, 1), 1), outs)

    if not axes:
        return run_tiles(params, arrays)
    # Gradients must be summed over devices in float32, even if an engine has cast the parameters before.
    params = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )
    # Inside, parameters stay split along axes that do not split tokens (`tensor`), which the compiler handles.
    other_axes = tuple({*AXES} - {*axes})
    rows = tuple(axis for axis in axes if axis != "seq") or None
    tokens = PartitionSpec(rows, "seq" if "seq" in axes else None)
    return jax.shard_map(
        run_tiles,
        mesh=None if layout.manual else layout.mesh,
        in_specs=(jax.tree.map(lambda spec: without_axes(spec, other_axes), specs), tokens),
        out_specs=tokens,
        axis_names=set(axes),
        check_vma=False,
    )(params, arrays)


def _gather_parameter(axes: tuple[str, ...], dtype: str, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The parameter x, gathered along the mesh axes `axes` if `spec` says that they split it."""
    for dim, entry in enumerate(spec):
        split = tuple(axis for axis in axes if axis in ((entry,) if isinstance(entry, str) else entry or ()))
        if split:
            return _gather(x, split, dim, dtype)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, axes: tuple[str, ...], dim: int, dtype: str) -> jax.Array:
    """All-gathers x in `dtype`, to send less, and returns it in the dtype of x."""
    # The result is float32, so that its gradient is summed over tiles and devices in float32.
    return jax.lax.all_gather(x.astype(dtype), axes, axis=dim, tiled=True).astype(x.dtype)


def _gather_forward(x: jax.Array, axes: tuple[str, ...], dim: int, dtype: str) -> tuple[jax.Array, None]:
    return _gather(x, axes, dim, dtype), None


def _gather_backward(
    axes: tuple[str, ...], dim: int, dtype: str, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    """The sum of the gradients over devices, of which each device keeps its own part."""
    return (jax.lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)
