"""The bidirectional encoder (BERT: Devlin et al. 2018), in its modern form (ModernBERT: Warner et al. 2024).

Its layers are those of the decoder, with the norm before each branch, but every token sees the whole document. Layers
may be local and global in turn (`transformer.window`, `transformer.global_every`). It predicts masked tokens, and
continues no text.
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
from llmjax.nn.layers import Norm, add_bias, matrix, product, vector
from llmjax.ops.activation import ACTIVATIONS
from llmjax.ops.attention.mask import Mask, self_mask
from llmjax.parallel.rules import Layout
from llmjax.ranges import Unset
from llmjax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """The keys of the section `bert`, explained in `configs/base.py`."""

    transform: Annotated[bool, Unset(True)]


@dataclasses.dataclass(frozen=True)
class Settings(BERTConfig, BlockConfig):
    """The keys of the sections `model`, `transformer` and `bert`, with derived sizes."""


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
    def _transform(self) -> Transform:
        return Transform(self.config, self.layout)

    def _init_boxed(self, rng: jax.Array) -> Params:
        params = super()._init_boxed(rng)
        if self.config.transform:
            x_BTD = jnp.zeros((1, 2, self.config.model_dim), self.config.dtype)
            # No key of the decoder's parameters is this one.
            own = jax.random.fold_in(rng, 1)
            params["transform"] = Transform(self.config, Layout()).init(own, x_BTD)["params"]
        return params

    def _normalize(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        hidden_BTD = super()._normalize(params, x_BTD)
        if not self.config.transform:
            return hidden_BTD
        transformed_BTD: Any = self._transform.apply({"params": params["transform"]}, hidden_BTD)
        return transformed_BTD

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
)
