"""The Transformer block: attention and a feed-forward layer, each added to the residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from llmjax.errors import choose
from llmjax.nn.attention import Attention, KeyValue, on_each_device
from llmjax.nn.cache import write
from llmjax.nn.config import NORM_AT, BlockConfig
from llmjax.nn.experts import Experts, Penalties
from llmjax.nn.layer_compute import LayerCompute
from llmjax.nn.layers import MLP, Norm
from llmjax.ops.attention.mask import Mask
from llmjax.ops.dropout import dropout
from llmjax.ops.position_bias import PositionBias
from llmjax.parallel.rules import Layout


class Source(NamedTuple):
    """What a layer reads of a second text, the source: its encoded tokens, or the keys and values made of them.

    mask       which tokens of the source each query sees
    x_BSD      the encoded tokens, ready to be projected
    kv         keys and values of this layer, in generation, where they are made once
    """

    mask: Mask
    x_BSD: jax.Array | None = None
    kv: KeyValue | None = None


class BlockOutput(NamedTuple):
    """The output of a block.

    x_BTD                   the residual stream after the block
    kv                      the keys and values that were attended to
    attention_BTD, mlp_BTD  what attention and MLP added to the residual stream, before dropout
    penalties               the loss terms of each token that a mixture of experts adds
    """

    x_BTD: jax.Array
    kv: KeyValue
    attention_BTD: jax.Array
    mlp_BTD: jax.Array
    penalties: Penalties


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm: Xiong et al. 2020).

    With `norm_at` output, it is x + norm(attention(x)), with both, x + norm(attention(norm(x))), and with sum,
    norm(x + attention(x)).

    `project` and `finish` work on each token separately. `mix_tokens` between them calls `attend`, one of the
    algorithms of `ops/attention`.
    """

    config: BlockConfig
    layout: Layout
    attend: Callable[..., jax.Array]
    compute: LayerCompute = LayerCompute()

    def setup(self) -> None:
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, c.use_bias)
        # What is normalised, see `NORM_AT`.
        self.normed = choose(NORM_AT, "transformer.norm_at", c.norm_at)
        if self.normed.inputs:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if self.normed.outputs:
            self.attention_out_norm, self.mlp_out_norm = norm(), norm()
        if self.normed.sums:
            self.attention_sum_norm, self.mlp_sum_norm = norm(), norm()
        self.attention = Attention(c, self.layout)
        if c.num_experts:
            self.experts = Experts(c, self.layout)
        else:
            self.mlp = MLP(c, self.layout)

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: KeyValue | None,
        mask: Mask,
        keys_BT: jax.Array | None = None,
        layer: int | jax.Array = 0,
        cached: KeyValue | None = None,
        slot: jax.Array | None = None,
        source: Source | None = None,
        position_bias: PositionBias | None = None,
    ) -> BlockOutput:
        """The output of the block.

        rotation  cos and sin of the positions, or None
        keys_BT   random keys for dropout; None turns dropout off
        layer     the index of the layer, which tells its dropout masks apart
        cached    cached keys and values, into which the new ones are written from `slot` on
        source    a second text, for a block that reads one
        position_bias  what attention adds to its scores by the distance of two tokens
        """
        q_BTNH, k_BSKH, v_BSKH = self.project(x_BTD, rotation)
        if cached is not None:
            # `cached` and `slot` are given together.
            assert slot is not None
            k_BSKH, v_BSKH = write(cached[0], k_BSKH, slot), write(cached[1], v_BSKH, slot)
        # Generation attends without shard_map: the compiler splits the cache and the few queries.
        out_BTNH = self.mix_tokens(
            q_BTNH, k_BSKH, v_BSKH, mask, Layout() if cached is not None else self.layout, position_bias
        )
        x_BTD, attention_BTD = self.add_attention(x_BTD, out_BTNH, keys_BT, layer)
        if source is not None:
            x_BTD = self.read_source(x_BTD, source, keys_BT, layer)
        real_BT = mask.q_segments_BT > 0
        x_BTD, mlp_BTD, penalties = self.add_mlp(x_BTD, keys_BT, layer, real_BT, alone=cached is not None)
        return BlockOutput(x_BTD, (k_BSKH, v_BSKH), attention_BTD, mlp_BTD, penalties)

    def read_source(
        self, x_BTD: jax.Array, source: Source, keys_BT: jax.Array | None, layer: int | jax.Array
    ) -> jax.Array:
        """x_BTD after attention to the source, which only `SourceBlock` has."""
        raise NotImplementedError

    def project(self, x_BTD: jax.Array, rotation: KeyValue | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the input, which is normalised first if `norm_at` says so."""
        if self.normed.inputs:
            x_BTD = self.attention_norm(x_BTD)
        return self.attention.project(x_BTD, rotation)

    def mix_tokens(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask,
        layout: Layout,
        position_bias: PositionBias | None = None,
    ) -> jax.Array:
        """out_BTNH, the result of attention. Each device of `layout` computes it for its own rows, tokens and heads."""
        attend = functools.partial(self.attend, softcap=self.config.attention_softcap)
        return on_each_device(attend, layout)(
            q_BTNH, k_BSKH, v_BSKH, mask, sinks_N=self.attention.sink_bias, position_bias=position_bias
        )

    def finish(
        self, x_BTD: jax.Array, out_BTNH: jax.Array, keys_BT: jax.Array | None, layer: int | jax.Array
    ) -> jax.Array:
        """x_BTD after the block, for layers that are computed in tiles, which have no experts."""
        x_BTD, _ = self.add_attention(x_BTD, out_BTNH, keys_BT, layer)
        return self.add_mlp(x_BTD, keys_BT, layer)[0]

    def add_attention(
        self, x_BTD: jax.Array, out_BTNH: jax.Array, keys_BT: jax.Array | None, layer: int | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x_BTD with the output of attention added to it, and this output."""
        attention_BTD = self.attention.output(out_BTNH)
        if self.normed.outputs:
            attention_BTD = self.attention_out_norm(attention_BTD)
        # Each place with dropout has its own salt: 0 for the embedding, then two per layer.
        x_BTD = x_BTD + dropout(attention_BTD, keys_BT, self.config.dropout, 2 * layer + 1)
        return self.attention_sum_norm(x_BTD) if self.normed.sums else x_BTD, attention_BTD

    def add_mlp(
        self,
        x_BTD: jax.Array,
        keys_BT: jax.Array | None,
        layer: int | jax.Array,
        real_BT: jax.Array | None = None,
        alone: bool = False,
    ) -> tuple[jax.Array, jax.Array, Penalties]:
        """x_BTD with the output of the feed-forward layer added to it, this output, and loss terms of experts.

        `real_BT` is false for padding; only experts need it, and `alone`, see `Experts`.
        """
        penalties: Penalties = {}
        into_BTD = self.mlp_norm(x_BTD) if self.normed.inputs else x_BTD
        if self.config.num_experts:
            assert real_BT is not None  # experts are never computed in tiles
            mlp_BTD, penalties = self.experts(into_BTD, real_BT, alone)
        else:
            mlp_BTD = self.mlp(into_BTD)
        if self.normed.outputs:
            mlp_BTD = self.mlp_out_norm(mlp_BTD)
        x_BTD = x_BTD + dropout(mlp_BTD, keys_BT, self.config.dropout, 2 * layer + 2)
        return self.mlp_sum_norm(x_BTD) if self.normed.sums else x_BTD, mlp_BTD, penalties
