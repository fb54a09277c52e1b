"""Multi-head attention with grouped queries (Ainslie et al. 2023), rotary positions, QK-norm, sinks and a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from llmjax.nn.cache import write
from llmjax.nn.config import ModelConfig
from llmjax.nn.layers import Norm, add_bias, matrix, product, vector
from llmjax.ops import rope
from llmjax.ops.attention.mask import Mask
from llmjax.parallel.rules import Layout, partition_spec, without_axes

KeyValue = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    """Self-attention of x_BTD under `mask`; `attend` is any algorithm of `ops/attention`."""

    config: ModelConfig
    layout: Layout
    attend: Callable[..., jax.Array]

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        turn: KeyValue | None,
        mask: Mask,
        cached: KeyValue | None = None,
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """out_BTD and the keys and values attended to: this call's own, or the cache with them written at `slot`."""
        c = self.config
        D, N, K, H = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
        std, out_std = c.init_std, c.init_std * (2 * c.num_layers) ** -0.5
        wq_DNH = matrix(self, "wq_DNH", (D, N, H), ("embed", "heads", "head_dim"), std, c.dtype)
        wk_DKH = matrix(self, "wk_DKH", (D, K, H), ("embed", "kv_heads", "head_dim"), std, c.dtype)
        wv_DKH = matrix(self, "wv_DKH", (D, K, H), ("embed", "kv_heads", "head_dim"), std, c.dtype)
        wo_DNH = matrix(self, "wo_DNH", (D, N, H), ("embed", "heads", "head_dim"), out_std, c.dtype)
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (
            product(x_BTD, w.reshape(D, -1), self.layout).reshape(B, T, -1, H)
            for w in (wq_DNH, wk_DKH, wv_DKH)
        )
        if c.use_bias:
            q_BTNH = add_bias(self, "q_bias", q_BTNH, ("heads", "head_dim"))
            k_BTKH = add_bias(self, "k_bias", k_BTKH, ("kv_heads", "head_dim"))
            v_BTKH = add_bias(self, "v_bias", v_BTKH, ("kv_heads", "head_dim"))
        if c.qk_norm:
            q_BTNH = Norm("rmsnorm", c.norm_eps, name="q_norm")(q_BTNH)
            k_BTKH = Norm("rmsnorm", c.norm_eps, name="k_norm")(k_BTKH)
        if turn is not None:
            q_BTNH, k_BTKH = rope.rotate(q_BTNH, *turn), rope.rotate(k_BTKH, *turn)
        q_BTNH = self.layout.constrain(q_BTNH, "batch", "length", "heads", "head_dim")
        attend = functools.partial(self.attend, softcap=c.attention_softcap)
        if cached is not None:
            k_BTKH, v_BTKH = write(cached[0], k_BTKH, slot), write(cached[1], v_BTKH, slot)
        else:
            attend = _on_each_device(attend, self.layout)
        sinks_N = vector(self, "sink_bias", (N,), ("heads",), 0.0) if c.attention_sinks else None
        out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, mask, sinks_N=sinks_N)
        out_BTD = product(out_BTNH.reshape(B, T, N * H), wo_DNH.reshape(D, N * H).T, self.layout)
        if c.use_bias:
            out_BTD = add_bias(self, "out_bias", out_BTD, (None,))
        return self.layout.constrain(out_BTD, "batch", "length", None), (k_BTKH, v_BTKH)


def _on_each_device(attend: Callable[..., jax.Array], layout: Layout) -> Callable[..., jax.Array]:
    """`attend` as each device does it for its own rows, tokens and heads, with the mask of the whole of these rows.

    The compiler would split an algorithm's arrays, but not its loops, which differ in length from device to device.
    """
    axes = () if layout.mesh is None else tuple(a for a in layout.mesh.axis_names if layout.axis_size(a) > 1)
    if not axes:
        return attend
    others = tuple(axis for axis in layout.mesh.axis_names if axis not in axes)

    def spec(*names: str | None) -> PartitionSpec:
        return without_axes(partition_spec(names), others)

    def split(
        q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, sinks_N: jax.Array | None
    ) -> jax.Array:
        whole = spec("batch", None)
        heads, kv_heads = (spec("batch", "length", name, None) for name in ("heads", "kv_heads"))
        mask_specs = dataclasses.replace(
            mask, q_segments_BT=whole, q_positions_BT=whole, k_segments_BS=whole, k_positions_BS=whole
        )
        return jax.shard_map(
            lambda q, k, v, mask, sinks: attend(q, k, v, mask, sinks_N=sinks),
            mesh=None if layout.manual else layout.mesh,
            in_specs=(heads, kv_heads, kv_heads, mask_specs, spec("heads")),
            out_specs=heads,
            axis_names=set(axes),
            check_vma=False,
        )(q_BTNH, k_BSKH, v_BSKH, mask, sinks_N)

    return split
