"""Multi-head attention with grouped queries (Ainslie et al. 2023), rotary positions, QK-norm and a cache."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from llmjax.nn.cache import write
from llmjax.nn.config import ModelConfig
from llmjax.nn.layers import Norm, add_bias, matrix, product
from llmjax.ops import rope
from llmjax.ops.attention.mask import Mask
from llmjax.parallel.rules import Layout

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
        if cached is not None:
            k_BTKH, v_BTKH = write(cached[0], k_BTKH, slot), write(cached[1], v_BTKH, slot)
        else:  # positions are split over `seq`, keys and values are gathered
            k_BTKH = self.layout.constrain(k_BTKH, "batch", None, "kv_heads", "head_dim")
            v_BTKH = self.layout.constrain(v_BTKH, "batch", None, "kv_heads", "head_dim")
        out_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, mask)
        out_BTD = product(out_BTNH.reshape(B, T, N * H), wo_DNH.reshape(D, N * H).T, self.layout)
        if c.use_bias:
            out_BTD = add_bias(self, "out_bias", out_BTD, (None,))
        return self.layout.constrain(out_BTD, "batch", "length", None), (k_BTKH, v_BTKH)
