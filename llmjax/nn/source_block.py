"""The block of a decoder that also reads a second text, the source, as in an encoder-decoder (Vaswani et al. 2017)."""

from __future__ import annotations

import functools

import jax

from llmjax.nn.attention import Attention, KeyValue, on_each_device
from llmjax.nn.block import Block, Source
from llmjax.nn.layers import Norm
from llmjax.ops.dropout import dropout
from llmjax.parallel.rules import Layout


class SourceBlock(Block):
    """A `Block` with attention to the source between its self-attention and its feed-forward layer.

    Queries and keys of this attention are not rotated: positions in the two texts have nothing to do with each other.
    """

    def setup(self) -> None:
        super().setup()
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, c.use_bias)
        if self.normed.inputs:
            self.source_norm = norm()
        if self.normed.outputs:
            self.source_out_norm = norm()
        if self.normed.sums:
            self.source_sum_norm = norm()
        self.source_attention = Attention(c, self.layout)

    def source_keys_values(self, x_BSD: jax.Array) -> KeyValue:
        """k_BSKH and v_BSKH of the encoded source, which generation makes once."""
        return self.source_attention.keys_values(x_BSD, None)

    def read_source(
        self, x_BTD: jax.Array, source: Source, keys_BT: jax.Array | None, layer: int | jax.Array
    ) -> jax.Array:
        into_BTD = self.source_norm(x_BTD) if self.normed.inputs else x_BTD
        q_BTNH = self.source_attention.queries(into_BTD, None)
        layout = self.layout
        if source.kv is None:
            assert source.x_BSD is not None  # one of the two is given
            k_BSKH, v_BSKH = self.source_keys_values(source.x_BSD)
        else:
            # Generation attends without shard_map: the compiler splits the few queries.
            (k_BSKH, v_BSKH), layout = source.kv, Layout()
        attend = functools.partial(self.attend, softcap=self.config.attention_softcap)
        out_BTNH = on_each_device(attend, layout)(
            q_BTNH, k_BSKH, v_BSKH, source.mask, sinks_N=self.source_attention.sink_bias
        )
        out_BTD = self.source_attention.output(out_BTNH)
        if self.normed.outputs:
            out_BTD = self.source_out_norm(out_BTD)
        # The salts of the other places with dropout are 0 to 2 L.
        salt = 2 * self.config.num_layers + 1 + layer
        x_BTD = x_BTD + dropout(out_BTD, keys_BT, self.config.dropout, salt)
        return self.source_sum_norm(x_BTD) if self.normed.sums else x_BTD
