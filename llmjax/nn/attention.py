"""Multi-head attention with grouped queries (Ainslie et al. 2023), rotary positions, QK-norm and attention sinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.errors import choose
from llmjax.nn.config import QK_NORM_OVER, BlockConfig
from llmjax.nn.layers import Norm, add_bias, matrix, product, vector
from llmjax.ops import rope
from llmjax.ops.attention.mask import Mask
from llmjax.ops.position_bias import PositionBias
from llmjax.parallel.rules import Layout, partition_spec, without_axes

# Keys and values, or cos and sin of a rotation.
KeyValue = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    """The parameters of attention, and its token-wise parts: the projections before and after the heads."""

    config: BlockConfig
    layout: Layout

    def setup(self) -> None:
        c = self.config
        D, N, K, H = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
        # Matrices that write to the residual stream start smaller, by 1 / sqrt(2 L): 2 L of them add up there (GPT-2:
        # Radford et al. 2019).
        std, out_std = c.init_std, c.init_std * (2 * c.num_layers) ** -0.5
        self.wq_DNH = matrix(self, "wq_DNH", (D, N, H), ("embed", "heads", "head_dim"), std, c.dtype)
        self.wk_DKH = matrix(self, "wk_DKH", (D, K, H), ("embed", "kv_heads", "head_dim"), std, c.dtype)
        self.wv_DKH = matrix(self, "wv_DKH", (D, K, H), ("embed", "kv_heads", "head_dim"), std, c.dtype)
        self.wo_DNH = matrix(
            self, "wo_DNH", (D, N, H), ("residual", "heads_in", "head_dim_in"), out_std, c.dtype
        )
        if c.use_bias or c.qkv_bias:
            self.q_bias = vector(self, "q_bias", (N, H), ("heads", "head_dim"), 0.0)
            self.k_bias = vector(self, "k_bias", (K, H), ("kv_heads", "head_dim"), 0.0)
            self.v_bias = vector(self, "v_bias", (K, H), ("kv_heads", "head_dim"), 0.0)
        if c.use_bias:
            self.out_bias = vector(self, "out_bias", (D,), ("feature",), 0.0)
        if c.qk_norm:
            self.q_norm, self.k_norm = (Norm("rmsnorm", c.norm_eps) for _ in range(2))
        self.sink_bias = vector(self, "sink_bias", (N,), ("heads",), 0.0) if c.attention_sinks else None

    def project(self, x_BTD: jax.Array, rotation: KeyValue | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q_BTNH, k_BTKH and v_BTKH of x_BTD. Queries and keys are rotated by `rotation`, the cos and sin of their
        positions."""
        return self.queries(x_BTD, rotation), *self.keys_values(x_BTD, rotation)

    def queries(self, x_BTD: jax.Array, rotation: KeyValue | None) -> jax.Array:
        """q_BTNH of x_BTD."""
        c = self.config
        q_BTNH = self._heads(x_BTD, self.wq_DNH)
        if c.use_bias or c.qkv_bias:
            q_BTNH = add_bias(q_BTNH, self.q_bias)
        if c.qk_norm:
            # QK-norm keeps attention scores bounded (Henry et al. 2020; Dehghani et al. 2023).
            q_BTNH = self._normalize(self.q_norm, q_BTNH)
        if rotation is not None:
            q_BTNH = rope.rotate(q_BTNH, *rotation)
        if c.score_dim and c.score_dim != c.head_dim:
            # Every algorithm of attention divides by the root of head_dim.
            q_BTNH = q_BTNH * jnp.asarray((c.head_dim / c.score_dim) ** 0.5, q_BTNH.dtype)
        return self.layout.constrain(q_BTNH, "batch", "length", "heads", "head_dim")

    def keys_values(self, x_BSD: jax.Array, rotation: KeyValue | None) -> KeyValue:
        """k_BSKH and v_BSKH of x_BSD."""
        c = self.config
        k_BSKH, v_BSKH = self._heads(x_BSD, self.wk_DKH), self._heads(x_BSD, self.wv_DKH)
        if c.use_bias or c.qkv_bias:
            k_BSKH, v_BSKH = add_bias(k_BSKH, self.k_bias), add_bias(v_BSKH, self.v_bias)
        if c.qk_norm:
            k_BSKH = self._normalize(self.k_norm, k_BSKH)
        if rotation is not None:
            k_BSKH = rope.rotate(k_BSKH, *rotation)
        return k_BSKH, v_BSKH

    def _heads(self, x_BTD: jax.Array, w_DNH: jax.Array) -> jax.Array:
        """The product of x_BTD with a matrix of several heads, [B, T, N, H]."""
        B, T, D = x_BTD.shape
        return product(x_BTD, w_DNH.reshape(D, -1), self.layout).reshape(B, T, -1, self.config.head_dim)

    def _normalize(self, norm: Norm, x_BTNH: jax.Array) -> jax.Array:
        """Normalised queries or keys: each head by itself, or all heads of a token together."""
        if not choose(QK_NORM_OVER, "transformer.qk_norm_over", self.config.qk_norm_over):
            return norm(x_BTNH)
        B, T, N, H = x_BTNH.shape
        return norm(x_BTNH.reshape(B, T, N * H)).reshape(B, T, N, H)

    def output(self, out_BTNH: jax.Array) -> jax.Array:
        """out_BTD, the projection of the outputs of all heads to the residual stream."""
        B, T, N, H = out_BTNH.shape
        # The matrix is stored with D first, as are the others; see `layers.MLP`.
        wo_DX = self.wo_DNH.reshape(-1, N * H)
        out_BTD = product(out_BTNH.reshape(B, T, N * H), wo_DX, self.layout, transposed=True)
        if self.config.use_bias:
            out_BTD = add_bias(out_BTD, self.out_bias)
        return self.layout.constrain(out_BTD, "batch", "length", None)


def on_each_device(attend: Callable[..., jax.Array], layout: Layout) -> Callable[..., jax.Array]:
    """`attend` applied on each device to its own rows, tokens and heads, with the mask of all tokens of its rows.

    All axes of the mesh are manual around `attend`, also those of size 1. There are three reasons: a Pallas kernel
    cannot be split by the compiler and is refused inside of automatic axes; only here does it learn which kind of
    device it is compiled for; and the compiler would split the arrays of an algorithm but not its loops, whose
    lengths differ between devices.
    """
    axes = () if layout.mesh is None else {*layout.mesh.axis_names} - {*layout.manual}
    if not axes:
        return attend

    def spec(*names: str | None) -> PartitionSpec:
        return without_axes(partition_spec(names), layout.manual)

    def split(
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask,
        *,
        sinks_N: jax.Array | None,
        position_bias: PositionBias | None = None,
    ) -> jax.Array:
        # The mask is whole along the sequence: a PartitionSpec takes the place of each of its arrays.
        whole: Any = spec("batch", None)
        heads, kv_heads = (spec("batch", "length", name, None) for name in ("heads", "kv_heads"))
        mask_specs = dataclasses.replace(
            mask, q_segments_BT=whole, q_positions_BT=whole, k_segments_BS=whole, k_positions_BS=whole
        )
        bias_specs: Any = spec()
        if position_bias is not None:
            heads_of_table: Any = spec(None, "heads")
            bias_specs = dataclasses.replace(position_bias, table_RN=heads_of_table)
        return jax.shard_map(
            lambda q, k, v, mask, sinks, bias: attend(q, k, v, mask, sinks_N=sinks, position_bias=bias),
            mesh=None if layout.manual else layout.mesh,
            in_specs=(heads, kv_heads, kv_heads, mask_specs, spec("heads"), bias_specs),
            out_specs=heads,
            axis_names=axes,
            check_vma=False,
        )(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N, position_bias)

    return split
