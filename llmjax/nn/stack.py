"""The stack of Transformer blocks: scanned or unrolled, with remat.

The parameters of all layers are stacked along a leading `layers` dimension in both cases, so `scan_layers` changes
how the model is compiled but not the checkpoint format.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from llmjax.nn.attention import KeyValue
from llmjax.nn.block import Block, BlockOutput, Source
from llmjax.nn.config import BlockConfig, layer_windows
from llmjax.nn.experts import Penalties
from llmjax.nn.remat import RESIDUAL, remat
from llmjax.nn.token_tiles import by_tiles, inner_layout
from llmjax.ops.attention.mask import Mask
from llmjax.ops.position_bias import PositionBias
from llmjax.types import Params


class Rotations(NamedTuple):
    """cos and sin of the positions, or None: in layers without a window, and in layers with one."""

    everywhere: KeyValue | None
    in_windows: KeyValue | None

    def of(self, window: int) -> KeyValue | None:
        """Those of a layer with this window; 0 means that it has none."""
        return self.in_windows if window else self.everywhere


def unstack(stacked: Any, n: int) -> list[Any]:
    """The n slices of a tree of arrays along their first axis."""
    leaves, treedef = jax.tree.flatten(stacked)
    # The gradient of a split is one concatenation. The gradient of n separate slices would be a sum of n padded
    # arrays.
    slices = [jax.lax.split(leaf, (1,) * n) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [jnp.squeeze(s[i], 0) for s in slices]) for i in range(n)]


def _output(block: Block, params: Params, *args: Any) -> BlockOutput:
    """The output of the block for these parameters. flax's types do not say that `apply` returns nothing else here."""
    output: Any = block.apply({"params": params}, *args)
    return output


def run_stack(
    block: Block,
    params: Params,
    x_BTD: jax.Array,
    rotations: Rotations,
    mask: Mask,
    *,
    keys_BT: jax.Array | None = None,
    specs: Any = None,
    source: Source | None = None,
    position_bias: PositionBias | None = None,
) -> tuple[jax.Array, Penalties]:
    """x after all layers, and the loss terms of each token, added up over the layers. Each layer uses `mask` with its
    own window.

    params  the parameters of all layers, stacked along a leading dimension
    specs   the PartitionSpecs of the parameters of one layer; needed only if layers are computed in tiles
    source  the second text, which every layer reads
    position_bias  what attention adds to its scores, the same in every layer
    """
    c, compute = block.config, block.compute

    def body(
        x_BTD: jax.Array, scanned: tuple[Params, int | jax.Array], window: int
    ) -> tuple[jax.Array, Penalties]:
        layer_mask, rotation = dataclasses.replace(mask, window=window), rotations.of(window)

        def layer(x_BTD: jax.Array, layer_params: Params, i: int | jax.Array) -> tuple[jax.Array, Penalties]:
            x_BTD = checkpoint_name(x_BTD, RESIDUAL)
            if compute.tile:
                tiled = block, layer_params, specs, x_BTD, rotation, layer_mask, keys_BT, i, position_bias
                return _tiled_layer(*tiled), {}
            arrays = x_BTD, rotation, layer_mask, keys_BT, i, None, None, source, position_bias
            out = _output(block, layer_params, *arrays)
            return out.x_BTD, out.penalties

        return remat(layer, compute.remat, compute.offload)(x_BTD, *scanned)

    if compute.scan_layers:
        x_BTD, stacked = _scan_layers(c, body, x_BTD, (params, jnp.arange(c.num_layers)))
        return x_BTD, {name: jnp.sum(values_LBT, axis=0) for name, values_LBT in stacked.items()}
    layers, penalties = unstack(params, c.num_layers), []
    for i, window in enumerate(layer_windows(c)):
        x_BTD, of_layer = body(x_BTD, (layers[i], i), window)
        penalties.append(of_layer)
    return x_BTD, jax.tree.map(lambda *layers: sum(layers[1:], layers[0]), *penalties)


def _tiled_layer(
    block: Block,
    params: Params,
    specs: Any,
    x_BTD: jax.Array,
    rotation: KeyValue | None,
    mask: Mask,
    keys_BT: jax.Array | None,
    layer: int | jax.Array,
    position_bias: PositionBias | None,
) -> jax.Array:
    """The output of a layer whose token-wise parts are computed tile by tile. Attention sees all tokens at once."""
    inner, c = block.clone(layout=inner_layout(block.layout)), block.config

    def project(params: Params, arrays: Any) -> Any:
        return inner.apply({"params": params}, *arrays, method="project")

    def finish(params: Params, arrays: Any) -> jax.Array:
        x_BTD, out_BTNH, keys_BT = arrays
        params, layer = params["modules"], params["layer"]
        # flax's types do not say that `apply` returns nothing else here.
        after_BTD: Any = inner.apply({"params": params}, x_BTD, out_BTNH, keys_BT, layer, method="finish")
        return after_BTD

    def of(tree: Any, *names: str) -> Any:
        # A block has some of the norms only.
        return {name: tree[name] for name in names if name in tree}

    tiles = functools.partial(by_tiles, layout=block.layout, tile=block.compute.tile, dtype=c.dtype)
    names: tuple[str, ...] = ("attention_norm", "attention")
    q, k, v = tiles(project, of(params, *names), of(specs, *names), (x_BTD, rotation))
    arrays = q, k, v, mask, block.layout, position_bias
    out_BTNH = block.apply({"params": params}, *arrays, method="mix_tokens")
    # In a scan, the layer index is a traced value. The function inside `jax.shard_map` must not close over traced
    # values, so the index is passed as an argument.
    names = (
        "attention", "attention_out_norm", "attention_sum_norm", "mlp_norm", "mlp", "mlp_out_norm", "mlp_sum_norm",
    )  # fmt: skip
    mine = {"modules": of(params, *names), "layer": jnp.asarray(layer)}
    return tiles(
        finish, mine, {"modules": of(specs, *names), "layer": PartitionSpec()}, (x_BTD, out_BTNH, keys_BT)
    )


def _scan_layers(
    config: BlockConfig,
    body: Callable[[jax.Array, Any, int], tuple[jax.Array, Any]],
    x: jax.Array,
    stacked: Any,
) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` of `body(x, slices, window)` over the layers, whose windows may differ.

    `stacked` holds the inputs of all layers. Returns the last x and the stacked outputs.
    """
    # A window must be known at compile time, so that keys outside of it are skipped. Windows repeat with the period
    # `global_every`, so one loop step runs one period of layers. Remaining layers come after the loop.
    L, period, windows = config.num_layers, max(1, config.global_every), layer_windows(config)
    if period == 1:
        return jax.lax.scan(lambda x, slices: body(x, slices, windows[0]), x, stacked)

    def run_layers(x: jax.Array, stacked: Any) -> tuple[jax.Array, Any]:
        outs = []
        n = jax.tree.leaves(stacked)[0].shape[0]
        for slices, window in zip(unstack(stacked, n), windows[:n], strict=True):
            x, out = body(x, slices, window)
            outs.append(out)
        return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outs)

    # Layers that fill whole periods are scanned; the rest follow, unrolled.
    looped, collected = L // period * period, []
    leaves, treedef = jax.tree.flatten(stacked)
    loop, rest = (
        jax.tree.unflatten(treedef, x) for x in zip(*(jax.lax.split(y, (looped, L - looped)) for y in leaves))
    )
    if looped:
        # [layers, ...] -> [periods, layers of a period, ...].
        periods = jax.tree.map(lambda y: y.reshape(-1, period, *y.shape[1:]), loop)
        x, outs = jax.lax.scan(run_layers, x, periods)
        collected.append(jax.tree.map(lambda y: y.reshape(looped, *y.shape[2:]), outs))
    if looped < L:
        x, outs = run_layers(x, rest)
        collected.append(outs)
    return x, jax.tree.map(lambda *ys: jnp.concatenate(ys), *collected)


def decode_stack(
    block: Block,
    params: Params,
    x_BTD: jax.Array,
    rotations: Rotations,
    mask: Mask,
    cached_LBSKH: KeyValue,
    slot: jax.Array,
    source: Source | None = None,
    position_bias: PositionBias | None = None,
) -> tuple[jax.Array, KeyValue]:
    """x after all layers, and the cached keys and values of every layer, with the new ones written from `slot` on.

    `source.kv` has the keys and values of all layers, stacked.
    """

    def body(
        x: jax.Array, scanned: tuple[Params, KeyValue, KeyValue | None], window: int
    ) -> tuple[jax.Array, KeyValue]:
        layer_params, cached, source_kv = scanned
        of_layer = None if source is None else source._replace(kv=source_kv)
        layer_mask = dataclasses.replace(mask, window=window)
        out = _output(
            block,
            layer_params,
            x,
            rotations.of(window),
            layer_mask,
            None,
            0,
            cached,
            slot,
            of_layer,
            position_bias,
        )
        return out.x_BTD, out.kv

    sources = None if source is None else source.kv
    return _scan_layers(block.config, body, x_BTD, (params, cached_LBSKH, sources))


def measure_stack(
    block: Block,
    params: Params,
    x_BTD: jax.Array,
    rotations: Rotations,
    mask: Mask,
    real_BT: jax.Array,
    source: Source | None = None,
    position_bias: PositionBias | None = None,
) -> dict[str, jax.Array]:
    """Root mean squares over the positions where `real_BT`, float32 [L], for each layer.

    `residual_rms` is the residual stream after the layer; `attention_rms` and `mlp_rms` are what its two branches add
    to it.
    """
    size = jnp.maximum(jnp.sum(real_BT), 1).astype(jnp.float32) * x_BTD.shape[-1]

    def rms(y_BTD: jax.Array) -> jax.Array:
        # Padding must not count, and its values may be anything.
        squares_BTD = jnp.where(real_BT[..., None], jnp.square(y_BTD.astype(jnp.float32)), 0.0)
        return jnp.sqrt(jnp.sum(squares_BTD) / size)

    def body(x: jax.Array, layer_params: Params, window: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        layer_mask = dataclasses.replace(mask, window=window)
        arrays = x, rotations.of(window), layer_mask, None, 0, None, None, source, position_bias
        out = _output(block, layer_params, *arrays)
        measured = {
            "residual_rms": rms(out.x_BTD),
            "attention_rms": rms(out.attention_BTD),
            "mlp_rms": rms(out.mlp_BTD),
        }
        return out.x_BTD, measured

    return _scan_layers(block.config, body, x_BTD, params)[1]


def init_stack(block: Block, rng: jax.Array, *args: object) -> Params:
    """Parameters of all layers, stacked, in flax's metadata boxes. The leading dimension has the logical axis
    `layers`."""
    # Each layer draws from a key of its own, so its initial values do not depend on how layers are compiled.
    rngs = jax.random.split(rng, block.config.num_layers)
    stacked = jax.vmap(lambda r: block.init(r, *args)["params"])(rngs)
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: box.replace(names=("layers", *box.names)), stacked, is_leaf=is_box)
