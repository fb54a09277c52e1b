"""The bidirectional encoder, in its first form (BERT: Devlin et al. 2018) and in the modern one (ModernBERT: Warner et
al. 2024).

Its layers are those of the decoder, but every token sees the whole document. It predicts masked tokens, and continues
no text. Without further keys it has the modern form: a norm before each branch, rotary positions, and layers that may
be local and global in turn (`transformer.window`, `transformer.global_every`).

The first form has `transformer.norm_at=sum`, `transformer.position=learned`, `transformer.norm=layernorm` with
`transformer.norm_eps=1e-12`, `transformer.activation=gelu_erf`, `transformer.use_bias=True`,
`transformer.qk_norm=False`, `bert.token_types=2`, `bert.embedding_norm=True` and `bert.output_bias=True`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmjax.errors import UserError, choose
from llmjax.models.contract import Cost
from llmjax.models.family import Sections
from llmjax.models.gpt import GPT, GPT_FAMILY
from llmjax.nn.cache import Cache
from llmjax.nn.config import BlockConfig, ModelConfig, block_config
from llmjax.nn.experts import Penalties
from llmjax.nn.layers import Norm, OutputBias, RelativePositions, add_bias, matrix, product, vector
from llmjax.ops.activation import ACTIVATIONS
from llmjax.ops.attention.mask import Mask, self_mask
from llmjax.parallel.rules import Layout
from llmjax.ranges import Range, Unset, check_ranges
from llmjax.types import Batch, Output, Params


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """The keys of the section `bert`, explained in `configs/base.py`."""

    transform: Annotated[bool, Unset(True)]
    token_types: Annotated[int, Range(1, 2**16, "none"), Unset(0)]
    embedding_norm: Annotated[bool, Unset(False)]
    output_bias: Annotated[bool, Unset(False)]

    def __post_init__(self) -> None:
        check_ranges("bert", self, BERTConfig)


@dataclasses.dataclass(frozen=True)
class Settings(BERTConfig, BlockConfig):
    """The keys of the sections `model`, `transformer` and `bert`, with derived sizes."""

    def __post_init__(self) -> None:
        BlockConfig.__post_init__(self)
        BERTConfig.__post_init__(self)


class TokenTypes(nn.Module):
    """The embeddings of token types."""

    config: Settings

    @nn.compact
    def __call__(self) -> None:
        c = self.config
        matrix(self, "token_types_CD", (c.token_types, c.model_dim), ("token_types", "embed"), c.init_std)


class Transform(nn.Module):
    """The layer between the last hidden state and the output matrix: a dense layer, an activation and a norm."""

    config: Settings
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, D = self.config, self.config.model_dim
        y_BTD = product(
            x_BTD, matrix(self, "w_DD", (D, D), ("embed", "feature"), c.init_std, c.dtype), self.layout
        )
        if c.use_bias:
            y_BTD = add_bias(y_BTD, vector(self, "bias", (D,), ("feature",), 0.0))
        # A gated activation needs two products. The function of its gate alone is what BERT has here.
        y_BTD = choose(ACTIVATIONS, "transformer.activation", c.activation).function(y_BTD)
        y_BTD = self.layout.constrain(y_BTD, "batch", "length", None)
        normalized: jax.Array = Norm(c.norm, c.norm_eps, c.use_bias, name="norm")(y_BTD)
        return normalized


@dataclasses.dataclass(frozen=True)
class BERT(GPT):
    """The `Model` contract for a bidirectional encoder, but for generation. The fields are those of `GPT`."""

    config: Settings

    @property
    def _relative(self) -> RelativePositions:
        return RelativePositions(self.config, both_sides=True)

    @property
    def _transform(self) -> Transform:
        return Transform(self.config, self.layout)

    def _init_boxed(self, rng: jax.Array) -> Params:
        c, params = self.config, super()._init_boxed(rng)
        x_BTD = jnp.zeros((1, 2, c.model_dim), c.dtype)
        # No key of the decoder's parameters is one of these.
        if c.transform:
            own = jax.random.fold_in(rng, 1)
            params["transform"] = Transform(c, Layout()).init(own, x_BTD)["params"]
        if c.token_types:
            types = TokenTypes(c).init(jax.random.fold_in(rng, 2))["params"]
            params["embedding"] = {**params["embedding"], **types}
        if c.output_bias:
            params["output"] = OutputBias(self.vocab_size).init(rng)["params"]
        if c.embedding_norm:
            params["embedding_norm"] = self._final_norm.init(rng, x_BTD)["params"]
        return params

    def _sum_embeddings(self, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BTD = super()._sum_embeddings(params, tokens_BT, positions_BT)
        if self.config.token_types:
            # A document is one text, whose tokens are all of the first type.
            x_BTD = x_BTD + params["embedding"]["token_types_CD"][:1][None]
        if not self.config.embedding_norm:
            return x_BTD
        normalized_BTD: Any = self._final_norm.apply({"params": params["embedding_norm"]}, x_BTD)
        return normalized_BTD

    def _output(self, params: Params, x_BTD: jax.Array, penalties: Penalties) -> Output:
        states_BTD = self._normalize(params, x_BTD)
        hidden_BTD: Any = states_BTD
        if self.config.transform:
            hidden_BTD = self._transform.apply({"params": params["transform"]}, states_BTD)
        return Output(hidden_BTD, penalties=penalties, states_BTD=states_BTD)

    def _output_bias(self, params: Params) -> jax.Array | None:
        return params["output"]["bias_V"] if self.config.output_bias else None

    def _mask(self, batch: Batch) -> Mask:
        mask = super()._mask(batch)
        return self_mask(mask.q_segments_BT, mask.q_positions_BT, causal=False)

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        raise UserError("model.family='bert' sees the tokens after each token, so that it continues no text")

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        # `attended` counts the keys up to the token. As many come after it.
        cost = super().cost(max(2 * attended - 1, attended), tokens_per_device, seq_len)
        extra = 6.0 * self.config.model_dim**2 if self.config.transform else 0.0
        return dataclasses.replace(cost, flops_per_token=cost.flops_per_token + extra)


def _config(model: ModelConfig, sections: Sections) -> Settings:
    return Settings(
        **vars(block_config(model, sections["transformer"], sections["experts"])), **vars(sections["bert"])
    )


BERT_FAMILY = dataclasses.replace(
    GPT_FAMILY,
    model=BERT,
    sections={**GPT_FAMILY.sections, "bert": BERTConfig},
    config=_config,
    sees_both_sides=True,
    optional={"bert.transform": "transform", "bert.output_bias": "output"},
)
