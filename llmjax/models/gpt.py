"""The decoder-only Transformer (Radford et al. 2018; Touvron et al. 2023): from GPT-2 to Llama by configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmjax.errors import choose
from llmjax.models.contract import Cache, Cost, box_axes, unbox
from llmjax.models.family import Family
from llmjax.models.transformer_sections import (
    heads_of,
    position_bias_of,
    position_table_of,
    resolve_sections,
    split_sizes,
)
from llmjax.nn.block import Block, Source
from llmjax.nn.cache import append_tokens, make_cache, select_rows
from llmjax.nn.config import (
    NORM_AT,
    BlockConfig,
    ExpertsConfig,
    TransformerConfig,
    block_config,
    layer_windows,
)
from llmjax.nn.experts import Penalties
from llmjax.nn.layer_compute import LayerCompute
from llmjax.nn.layers import Norm, RelativePositions, look_up, make_position_bias, matrix
from llmjax.nn.position import POSITIONS
from llmjax.nn.remat import Widths, kept_width
from llmjax.nn.stack import Rotations, decode_stack, init_stack, measure_stack, run_stack
from llmjax.ops import rope
from llmjax.ops.activation import ACTIVATIONS
from llmjax.ops.attention import full
from llmjax.ops.attention.mask import Mask, self_mask
from llmjax.ops.dropout import dropout, token_keys
from llmjax.ops.logits import head_logits
from llmjax.ops.position_bias import PositionBias
from llmjax.parallel.rules import Layout, is_axes, partition_spec
from llmjax.types import Batch, Head, Output, Params

# What the random draws of relative positions are folded with.
RELATIVE = 0x72656C


class Embedding(nn.Module):
    """The token embeddings, the position embeddings if they are learned, and the output matrix unless it is tied."""

    config: BlockConfig
    vocab_size: int
    max_positions: int

    @nn.compact
    def __call__(self) -> None:
        c, D = self.config, self.config.model_dim
        matrix(self, "embedding_VD", (self.vocab_size, D), ("vocab", "embed"), c.init_std)
        if POSITIONS[c.position].table:
            matrix(self, "positions_TD", (self.max_positions, D), ("positions", "embed"), c.init_std)
        if not c.tie_embeddings:
            matrix(self, "unembedding_VD", (self.vocab_size, D), ("classes", "embed"), c.init_std)


@dataclasses.dataclass(frozen=True)
class GPT:
    """The `Model` contract for a decoder-only Transformer.

    config         a resolved config
    max_positions  the size of the table of learned positions
    attend         the attention algorithm of training; generation always uses `full`, because it has few queries
    holds_scores   whether `attend` keeps all scores for the backward pass, for `cost`
    compute        choices that change time and memory but no result
    """

    config: BlockConfig
    vocab_size: int
    max_positions: int
    layout: Layout = Layout()
    attend: Callable[..., jax.Array] = full.attend
    holds_scores: bool = False
    compute: LayerCompute = LayerCompute()

    @property
    def position_limit(self) -> int:
        return self.max_positions if POSITIONS[self.config.position].table else 0

    @property
    def _block(self) -> Block:
        return Block(self.config, self.layout, self.attend, self.compute)

    @property
    def _embedding(self) -> Embedding:
        return Embedding(self.config, self.vocab_size, self.max_positions)

    @property
    def _relative(self) -> RelativePositions:
        return RelativePositions(self.config)

    @property
    def _final_norm(self) -> Norm:
        return Norm(self.config.norm, self.config.norm_eps, self.config.use_bias)

    @property
    def _ends_normalized(self) -> bool:
        """Whether the last layer puts out normalised states, so that there is no final norm."""
        return NORM_AT[self.config.norm_at].sums

    def _init_boxed(self, rng: jax.Array) -> Params:
        """Parameters in flax's metadata boxes. Their values depend on the seed and the config, not on the mesh."""
        rng_embedding, rng_layers, rng_norm = jax.random.split(rng, 3)
        # Shapes of parameters do not depend on the batch, so a tiny one and the reference attention will do.
        x_BTD = jnp.zeros((1, 2, self.config.model_dim), self.config.dtype)
        index_BT = jnp.zeros((1, 2), jnp.int32)
        block = Block(self.config, Layout(), full.attend)
        params = {
            "embedding": self._embedding.init(rng_embedding)["params"],
            "layers": init_stack(
                block, rng_layers, x_BTD, self._rotations(index_BT).everywhere, self_mask(index_BT, index_BT)
            ),
        }
        if not self._ends_normalized:
            params["final_norm"] = self._final_norm.init(rng_norm, x_BTD)["params"]
        if POSITIONS[self.config.position].biases == "learned":
            params["relative"] = self._relative.init(jax.random.fold_in(rng, RELATIVE))["params"]
        return params

    def init(self, rng: jax.Array) -> Params:
        return unbox(self._init_boxed(rng))

    def axes(self) -> Any:
        return box_axes(jax.eval_shape(self._init_boxed, jax.eval_shape(jax.random.key, 0)))

    def _rotations(self, positions_BT: jax.Array) -> Rotations:
        """cos and sin of the positions for rotary embeddings, or None if the model has none."""
        c = self.config
        if not POSITIONS[c.position].rotates:
            return Rotations(None, None)
        scaling = c.rope_scaling, c.rope_factor, c.rope_original_len
        everywhere = rope.rotation(positions_BT, c.head_dim, c.rope_theta, *scaling)
        if not c.local_rope_theta:
            return Rotations(everywhere, everywhere)
        # A layer with a window never sees longer distances than it was trained on, and needs no scaling.
        return Rotations(everywhere, rope.rotation(positions_BT, c.head_dim, c.local_rope_theta))

    def _position_bias(self, params: Params) -> PositionBias | None:
        return make_position_bias(self.config, params.get("relative"), self._relative.both_sides)

    def _embed(self, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x_BTD, what the first layer reads."""
        x_BTD = self._sum_embeddings(params, tokens_BT, positions_BT)
        return self.layout.constrain(x_BTD.astype(self.config.dtype), "batch", "length", None)

    def _sum_embeddings(self, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """x_BTD, float32, the embedded tokens with all that is added to them."""
        c, tables = self.config, params["embedding"]
        x_BTD = look_up(tables["embedding_VD"], tokens_BT, self.layout)
        if c.scale_embedding:
            x_BTD = x_BTD * c.model_dim**0.5
        positions = choose(POSITIONS, "transformer.position", c.position)
        return positions.add(x_BTD, positions_BT, tables["positions_TD"] if positions.table else None)

    def _normalize(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        if self._ends_normalized:
            return x_BTD
        hidden_BTD: Any = self._final_norm.apply({"params": params["final_norm"]}, x_BTD)
        return hidden_BTD

    def _output(self, params: Params, x_BTD: jax.Array, penalties: Penalties) -> Output:
        """The output of the model, made of what the last layer put out."""
        return Output(self._normalize(params, x_BTD), penalties=penalties)

    def _mask(self, batch: Batch) -> Mask:
        """The causal mask. Segments and positions of whole rows are gathered on every device once, for all layers."""
        whole = (self.layout.constrain(x, "batch", None) for x in (batch.segments, batch.positions))
        return self_mask(*whole)

    def _source(self, params: Params, batch: Batch, rng: jax.Array | None) -> Source | None:
        """The second text of the batch, encoded, for a family that reads one."""
        return None

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Output:
        keys_BT = None
        if rng is not None and self.config.dropout:
            # Dropout draws from the packed sequence number and the column, wherever the token lies
            # (`ops/dropout.py`).
            columns_BT = batch.columns
            if columns_BT is None:
                columns_BT = jax.lax.broadcasted_iota(jnp.int32, batch.tokens.shape, 1)
            keys_BT = token_keys(rng, batch.index, columns_BT)
        x_BTD = self._embed(params, batch.tokens, batch.positions)
        x_BTD = dropout(x_BTD, keys_BT, self.config.dropout, 0)
        mask = self._mask(batch)
        # The specs of one layer: without the leading dimension `layers`.
        specs = None
        if self.compute.tile:
            specs = jax.tree.map(
                lambda names: partition_spec(names[1:]), self.axes()["layers"], is_leaf=is_axes
            )
        rotations = self._rotations(batch.positions)
        x_BTD, penalties = run_stack(
            self._block,
            params["layers"],
            x_BTD,
            rotations,
            mask,
            keys_BT=keys_BT,
            specs=specs,
            source=self._source(params, batch, rng),
            position_bias=self._position_bias(params),
        )
        return self._output(params, x_BTD, penalties)

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        x_BTD = self._embed(params, batch.tokens, batch.positions)
        mask = self._mask(batch)
        rotations = self._rotations(batch.positions)
        source = self._source(params, batch, None)
        return measure_stack(
            self._block,
            params["layers"],
            x_BTD,
            rotations,
            mask,
            batch.segments > 0,
            source,
            self._position_bias(params),
        )

    def _output_table(self, params: Params) -> jax.Array:
        return params["embedding"]["embedding_VD" if self.config.tie_embeddings else "unembedding_VD"]

    def _output_bias(self, params: Params) -> jax.Array | None:
        """bias_V of the logits, which only some families have."""
        return None

    def head(self, params: Params) -> Head:
        w_VD = self._output_table(params)
        # The axes `fsdp` and `seq` split the matrix along D.
        if self.layout.axis_size("fsdp") * self.layout.axis_size("seq") > 1:
            # Gathered once here; otherwise each chunk of the loss would gather it. Cast first, because a copy is made
            # anyway.
            w_VD = self.layout.constrain(w_VD.astype(self.config.dtype), "classes", None)
        return Head(w_VD, self._output_bias(params), self.config.logit_softcap)

    def make_cache(self, batch: int, slots: int) -> Cache:
        c = self.config
        return make_cache(c.num_layers, batch, slots, c.num_kv_heads, c.head_dim, c.dtype)

    def select_rows(self, cache: Cache, rows_B: jax.Array) -> Cache:
        return select_rows(cache, rows_B)

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        block = Block(self.config, self.layout, full.attend_in_cache)
        return self._decode(block, params, tokens_BT, cache, valid_BT, None)

    def _decode(
        self,
        block: Block,
        params: Params,
        tokens_BT: jax.Array,
        cache: Cache,
        valid_BT: jax.Array | None,
        source: Source | None,
    ) -> tuple[jax.Array, Cache]:
        """`decode`, with the layers of `block` and the keys and values of a second text, if there is one."""
        c = self.config
        valid_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        slot = cache.used
        cache, segments_BT, positions_BT = append_tokens(cache, valid_BT)
        # Keys of new tokens go into the cache first, so that the tokens also attend to each other.
        mask = Mask(segments_BT, cache.segments_BS, positions_BT, cache.positions_BS)
        x_BTD = self._embed(params, tokens_BT, positions_BT)
        x_BTD, (k_LBSKH, v_LBSKH) = decode_stack(
            block,
            params["layers"],
            x_BTD,
            self._rotations(positions_BT),
            mask,
            (cache.k_LBSKH, cache.v_LBSKH),
            slot,
            source,
            self._position_bias(params),
        )
        hidden_BTD = self._normalize(params, x_BTD)
        # Generation has few tokens, so the output matrix stays split.
        head = Head(self._output_table(params), self._output_bias(params), c.logit_softcap)
        cache = dataclasses.replace(cache, k_LBSKH=k_LBSKH, v_LBSKH=v_LBSKH)
        return head_logits(hidden_BTD, head), cache

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        return Cost(self._flops_per_token(attended), self._activation_bytes(tokens_per_device, seq_len))

    @property
    def _mlp_width(self) -> int:
        """The hidden width of the feed-forward layers that one token goes through: of some experts, or of one MLP."""
        c = self.config
        return c.expert_dim * (c.experts_per_token + c.shared_experts) if c.num_experts else c.mlp_dim

    def _flops_per_token(self, attended: float) -> float:
        """6 per weight of a matrix product (Kaplan et al. 2020), and 12 N H per attended key and layer. Lookups are
        free."""
        c = self.config
        attention = c.model_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        # The router reads a token once for each expert.
        mlp = c.model_dim * (self._mlp_width * (ACTIVATIONS[c.activation].projections + 1) + c.num_experts)
        weights = c.num_layers * (attention + mlp) + self.vocab_size * c.model_dim
        # A layer with a window attends to `window` keys at most.
        keys = sum(min(attended, window or attended) for window in layer_windows(c))
        return 6.0 * weights + 12.0 * c.num_heads * c.head_dim * keys

    def _activation_bytes(self, tokens: float, seq_len: int) -> int:
        """An estimate of the bytes per device that the backward pass keeps for this number of tokens."""
        c, how, tensor = self.config, self.compute, self.layout.axis_size("tensor")
        # Without remat, a layer keeps per token: 3 arrays of width D for each norm and its input; queries and keys
        # before and after their norm and rotation, and once more in the layout of attention; the hidden layer before,
        # in and after the activation (of one tile, with tiles); and all scores, if attention keeps them.
        queries, keys = (heads * c.head_dim / tensor for heads in (c.num_heads, c.num_kv_heads))
        hidden, projections = self._mlp_width / tensor, ACTIVATIONS[c.activation].projections
        at_once = min(1.0, how.tile / tokens) if how.tile else 1.0
        layer = 6 * c.model_dim + 5 * queries + 6 * keys + (1 + 2 * projections) * hidden * at_once
        if self.holds_scores:
            layer += 2 * seq_len * c.num_heads / tensor
        # Remat keeps less: `dots` the outputs of matrix products, `attention` the input and the output of the heads,
        # `full` only the input. `kept_width` chooses.
        products = 2 * c.model_dim + queries + 2 * keys + projections * hidden
        widths = Widths(c.model_dim, queries, products, layer)
        return int(
            tokens * kept_width(how.remat, how.offload, widths, c.num_layers) * jnp.dtype(c.dtype).itemsize
        )


GPT_FAMILY = Family(
    GPT,
    sections={"transformer": TransformerConfig, "experts": ExpertsConfig},
    compute=tuple(field.name for field in dataclasses.fields(LayerCompute)),
    resolve=resolve_sections,
    config=lambda model, sections: block_config(model, sections["transformer"], sections["experts"]),
    split=split_sizes,
    heads=heads_of,
    position_bias=position_bias_of,
    position_table=position_table_of,
    # How rotary positions turn, and which keys attention sees.
    free_on_init=tuple(
        f"transformer.{key}"
        for key in (
            "rope_theta", "local_rope_theta", "rope_scaling", "rope_factor", "rope_original_len", "window",
            "global_every", "attention_softcap",
        )
    ),
)  # fmt: skip
