"""The encoder-decoder (Vaswani et al. 2017): it reads one text, the source, and writes another, as in translation.

The encoder's layers are those of `bert`, in which every token sees the whole source. The decoder's layers are those of
`gpt`, each with one more attention, to the encoded source. Both texts share one table of embeddings. Sources and
targets are packed: a row holds several documents, and a target sees its own source only.

`transformer.norm_at=sum`, `transformer.position=sinusoidal`, `transformer.norm=layernorm` and an activation without a
gate make the model of the paper.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from llmjax.models.contract import Cost
from llmjax.models.family import Family, Sections
from llmjax.models.gpt import GPT, GPT_FAMILY, RELATIVE
from llmjax.models.transformer_sections import (
    heads_of,
    position_bias_of,
    position_table_of,
    resolve_blocks,
)
from llmjax.nn import cache as nn_cache
from llmjax.nn.attention import KeyValue
from llmjax.nn.block import Block, Source
from llmjax.nn.config import BlockConfig, ExpertsConfig, ModelConfig, TransformerConfig, block_config
from llmjax.nn.layer_compute import LayerCompute
from llmjax.nn.layers import OutputBias, RelativePositions, make_position_bias
from llmjax.nn.position import POSITIONS
from llmjax.nn.source_block import SourceBlock
from llmjax.nn.stack import init_stack, run_stack
from llmjax.ops.attention import full
from llmjax.ops.attention.mask import cross_mask, self_mask
from llmjax.ops.dropout import dropout, token_keys
from llmjax.parallel.rules import Layout
from llmjax.ranges import Range, Unset, check_ranges, unset
from llmjax.types import Batch, Params

# What the encoder's random draws are folded with, so that they are not the decoder's.
ENCODER = 0x656E63


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """The keys of the section `encoder_decoder`, explained in `configs/base.py`."""

    encoder_layers: Annotated[int, Range(1, 10_000, "model.num_layers"), Unset(0)]
    scale_output: Annotated[bool, Unset(False)]
    output_bias: Annotated[bool, Unset(False)]

    def __post_init__(self) -> None:
        check_ranges("encoder_decoder", self, EncoderDecoderConfig)


@dataclasses.dataclass(frozen=True)
class Settings(EncoderDecoderConfig, BlockConfig):
    """The keys of the sections `model`, `transformer` and `encoder_decoder`, with derived sizes."""

    def __post_init__(self) -> None:
        BlockConfig.__post_init__(self)
        EncoderDecoderConfig.__post_init__(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What generation remembers.

    written      the cache of the text that is written
    source_kv    keys and values of the source in every layer of the decoder, [L, B, S, K, H] each
    segments_BS  int32, 1 for tokens of the source and 0 for padding
    """

    written: nn_cache.Cache
    source_kv: KeyValue
    segments_BS: jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(GPT):
    """The `Model` contract for an encoder-decoder. The fields are those of `GPT`."""

    config: Settings

    @property
    def _block(self) -> SourceBlock:
        return SourceBlock(self.config, self.layout, self.attend, self.compute)

    @property
    def _encoder_block(self) -> Block:
        config = dataclasses.replace(self.config, num_layers=self.config.encoder_layers)
        return Block(config, self.layout, self.attend, self.compute)

    @property
    def _encoder_relative(self) -> RelativePositions:
        return RelativePositions(self.config, both_sides=True)

    def _init_boxed(self, rng: jax.Array) -> Params:
        c = self.config
        rng_encoder, rng_norm, rng_decoder = jax.random.split(jax.random.fold_in(rng, ENCODER), 3)
        x_BTD, index_BT = jnp.zeros((1, 2, c.model_dim), c.dtype), jnp.zeros((1, 2), jnp.int32)
        rotation, mask = self._rotations(index_BT).everywhere, self_mask(index_BT, index_BT)
        params = super()._init_boxed(rng)
        # The decoder's layers read a source as well.
        source = Source(cross_mask(index_BT, index_BT), x_BTD)
        block = SourceBlock(c, Layout(), full.attend)
        arguments = x_BTD, rotation, mask, None, 0, None, None, source
        params["layers"] = init_stack(block, rng_decoder, *arguments)
        encoder = dataclasses.replace(self._encoder_block, layout=Layout(), attend=full.attend)
        params["encoder"] = init_stack(encoder, rng_encoder, x_BTD, rotation, mask)
        if not self._ends_normalized:
            params["encoder_norm"] = self._final_norm.init(rng_norm, x_BTD)["params"]
        if POSITIONS[c.position].biases == "learned":
            own = jax.random.fold_in(rng_encoder, RELATIVE)
            params["encoder_relative"] = self._encoder_relative.init(own)["params"]
        if c.output_bias:
            params["output"] = OutputBias(self.vocab_size).init(rng)["params"]
        return params

    def _encode(
        self,
        params: Params,
        tokens_BS: jax.Array,
        segments_BS: jax.Array,
        positions_BS: jax.Array,
        keys_BS: Any,
    ) -> jax.Array:
        """x_BSD, the encoded source."""
        x_BSD = dropout(self._embed(params, tokens_BS, positions_BS), keys_BS, self.config.dropout, 0)
        whole = (self.layout.constrain(x, "batch", None) for x in (segments_BS, positions_BS))
        x_BSD, _ = run_stack(
            self._encoder_block,
            params["encoder"],
            x_BSD,
            self._rotations(positions_BS),
            self_mask(*whole, causal=False),
            keys_BT=keys_BS,
            position_bias=make_position_bias(self.config, params.get("encoder_relative"), both_sides=True),
        )
        if self._ends_normalized:
            return x_BSD
        normalized_BSD: Any = self._final_norm.apply({"params": params["encoder_norm"]}, x_BSD)
        return normalized_BSD

    def encode_source(
        self, params: Params, tokens_BS: jax.Array, segments_BS: jax.Array, positions_BS: jax.Array
    ) -> jax.Array:
        return self._encode(params, tokens_BS, segments_BS, positions_BS, None)

    def _source(self, params: Params, batch: Batch, rng: jax.Array | None) -> Source:
        keys_BS = None
        if rng is not None and self.config.dropout:
            # A layout moves no token of the source, so that its columns are counted.
            columns_BS = jax.lax.broadcasted_iota(jnp.int32, batch.source_tokens.shape, 1)
            keys_BS = token_keys(jax.random.fold_in(rng, ENCODER), batch.index, columns_BS)
        x_BSD = self._encode(
            params, batch.source_tokens, batch.source_segments, batch.source_positions, keys_BS
        )
        segments = (self.layout.constrain(x, "batch", None) for x in (batch.segments, batch.source_segments))
        return Source(cross_mask(*segments), x_BSD)

    def _normalize(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        hidden_BTD = super()._normalize(params, x_BTD)
        c = self.config
        # T5 divides the states by the root of their width where the embedding is the output matrix as well.
        return hidden_BTD * jnp.asarray(c.model_dim**-0.5, hidden_BTD.dtype) if c.scale_output else hidden_BTD

    def _output_bias(self, params: Params) -> jax.Array | None:
        return params["output"]["bias_V"] if self.config.output_bias else None

    def make_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache, with no source. `read_source` gives it one."""
        c = self.config
        kv = jnp.zeros((c.num_layers, batch, 0, c.num_kv_heads, c.head_dim), c.dtype)
        return Cache(super().make_cache(batch, slots), (kv, kv), jnp.zeros((batch, 0), jnp.int32))

    def read_source(self, params: Params, tokens_BS: jax.Array, valid_BS: jax.Array, cache: Cache) -> Cache:
        """The cache with the sources that its rows are to be written from.

        tokens_BS  ids of the source of each row, padded
        valid_BS   false for padding
        """
        segments_BS = valid_BS.astype(jnp.int32)
        positions_BS = (jnp.cumsum(segments_BS, axis=1) - 1) * segments_BS
        # The compiler splits the work, as it does with the cache: the rows may be fewer than the devices of a batch.
        alone = dataclasses.replace(self, layout=Layout(), attend=full.attend)
        x_BSD = alone._encode(params, tokens_BS, segments_BS, positions_BS, None)
        block = self._block

        def of_layer(layer: Params) -> Any:
            return block.apply({"params": layer}, x_BSD, method="source_keys_values")

        return Cache(cache.written, jax.lax.map(of_layer, params["layers"]), segments_BS)

    def select_rows(self, cache: Cache, rows_B: jax.Array) -> Cache:
        k_LBSKH, v_LBSKH = (x[:, rows_B] for x in cache.source_kv)
        written = nn_cache.select_rows(cache.written, rows_B)
        return Cache(written, (k_LBSKH, v_LBSKH), cache.segments_BS[rows_B])

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        block = SourceBlock(self.config, self.layout, full.attend_in_cache)
        # What is read here belongs to the only document of its row.
        own_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        source = Source(cross_mask(own_BT, cache.segments_BS), kv=cache.source_kv)
        logits_BTV, written = self._decode(block, params, tokens_BT, cache.written, valid_BT, source)
        return logits_BTV, dataclasses.replace(cache, written=written)

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        """The cost of a micro-step in which every token of a target comes with one of its source."""
        c = self.config
        decoder = super().cost(attended, tokens_per_device, seq_len)
        # `attended` counts the keys up to a token. Those after it are as many, and so are those of the source.
        whole = max(2 * attended - 1, attended)
        encoder = GPT(
            dataclasses.replace(c, num_layers=c.encoder_layers), 0, self.max_positions, self.layout,
            holds_scores=self.holds_scores, compute=self.compute,
        ).cost(whole, tokens_per_device, seq_len)  # fmt: skip
        width = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        cross = c.num_layers * (6.0 * c.model_dim * width + 12.0 * c.num_heads * c.head_dim * whole)
        # A layer of the decoder keeps what its second attention reads, makes and puts out.
        tensor, itemsize = self.layout.axis_size("tensor"), jnp.dtype(c.dtype).itemsize
        kept = c.num_layers * (2 * c.model_dim + 2 * width / tensor) * itemsize * tokens_per_device
        return Cost(
            decoder.flops_per_token + encoder.flops_per_token + cross,
            decoder.activation_bytes + encoder.activation_bytes + int(kept),
        )


def _config(model: ModelConfig, sections: Sections) -> Settings:
    blocks = block_config(model, sections["transformer"], ExpertsConfig(**unset(ExpertsConfig)))
    return Settings(**vars(blocks), **vars(sections["encoder_decoder"]))


def _resolve(model: ModelConfig, sections: Sections, seq_len: int, compute: LayerCompute) -> Sections:
    own: EncoderDecoderConfig = sections["encoder_decoder"]
    blocks = resolve_blocks(model, sections["transformer"], ExpertsConfig(**unset(ExpertsConfig)), seq_len)
    return {
        **sections,
        "transformer": blocks["transformer"],
        "encoder_decoder": dataclasses.replace(own, encoder_layers=own.encoder_layers or model.num_layers),
    }


def _split(sections: Sections) -> dict[str, int]:
    keys = ("num_heads", "num_kv_heads", "mlp_dim")
    return {f"transformer.{key}": getattr(sections["transformer"], key) for key in keys}


ENCODER_DECODER_FAMILY = Family(
    EncoderDecoder,
    sections={"transformer": TransformerConfig, "encoder_decoder": EncoderDecoderConfig},
    compute=tuple(key for key in GPT_FAMILY.compute if key != "tile"),
    resolve=_resolve,
    config=_config,
    split=_split,
    heads=heads_of,
    position_bias=position_bias_of,
    position_table=position_table_of,
    reads_source=True,
    optional={"encoder_decoder.output_bias": "output"},
    free_on_init=GPT_FAMILY.free_on_init,
)
