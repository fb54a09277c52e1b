"""The sections `model`, `transformer` and `experts`: the shape of a model, derived sizes, and the rules between keys.

`model` has the keys of every family, and `transformer` those of the families that are made of Transformer layers, which
may hold a mixture of `experts`. The modules of this folder read all three sections as one `BlockConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Annotated, NamedTuple

from llmjax.errors import UserError, choose
from llmjax.nn.position import POSITIONS
from llmjax.ops.activation import ACTIVATIONS
from llmjax.ops.norm import NORMS
from llmjax.ops.rope import SCALINGS
from llmjax.ranges import COUNT, Range, Unset, check_ranges, unset

DTYPES = ("float32", "bfloat16")


class NormPlaces(NamedTuple):
    """What is normalised: what attention and feed-forward layer read, what they put out before it is added to the
    residual stream, or the sum of both. With sums, the last layer leaves nothing for a final norm to do."""

    inputs: bool = False
    outputs: bool = False
    sums: bool = False


NORM_AT = {
    "input": NormPlaces(inputs=True),  # Xiong et al. 2020
    "output": NormPlaces(outputs=True),  # OLMo 2: Walsh et al. 2024
    "both": NormPlaces(inputs=True, outputs=True),  # Gemma 2: Riviere et al. 2024
    "sum": NormPlaces(sums=True),  # Vaswani et al. 2017
}
# Whether the norm of queries and keys averages over all heads together (OLMo 2).
QK_NORM_OVER = {"head": False, "all": True}
# The names that a key may have. `model.family` is not among them: its table lies above, in `models/table.py`.
CHOICES: dict[str, Collection[str]] = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "position": POSITIONS,
    "rope_scaling": SCALINGS,
    "norm_at": NORM_AT,
    "qk_norm_over": QK_NORM_OVER,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The keys of the section `model`, which every family reads. They are explained in `configs/base.py`."""

    family: str
    num_layers: Annotated[int, Range(1, 10_000)]
    model_dim: Annotated[int, Range(1, 2**20)]
    tie_embeddings: bool
    logit_softcap: Annotated[float, Range(1e-3, 1e6, "none")]
    dropout: Annotated[float, Range(0, 1, below=True)]
    init_std: Annotated[float, Range(1e-10, 1e3)]
    dtype: str

    def __post_init__(self) -> None:
        check_ranges("model", self, ModelConfig)
        choose(dict.fromkeys(DTYPES), "model.dtype", self.dtype)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The keys of the section `transformer`, explained in `configs/base.py`. `resolve` replaces sizes of 0 by their
    defaults."""

    num_heads: Annotated[int, Range(1, 2**16), Unset(4, always=True)]
    num_kv_heads: Annotated[int, Range(1, 2**16, "num_heads"), Unset(0, always=True)]
    head_dim: Annotated[int, Range(1, 2**20, "the default"), Unset(0, always=True)]
    mlp_dim: Annotated[int, Range(1, 2**24, "the default"), Unset(0, always=True)]
    activation: Annotated[str, Unset("swiglu", always=True)]
    norm: Annotated[str, Unset("rmsnorm", always=True)]
    norm_eps: Annotated[float, Range(1e-30, 1.0), Unset(1e-6, always=True)]
    position: Annotated[str, Unset("rope", always=True)]
    rope_theta: Annotated[float, Range(1, 1e15, above=True), Unset(10000.0, always=True)]
    local_rope_theta: Annotated[float, Range(1, 1e15, "rope_theta", above=True), Unset(0.0)]
    rope_scaling: Annotated[str, Unset("none")]
    rope_factor: Annotated[float, Range(1, 1e6), Unset(1.0)]
    rope_original_len: Annotated[int, Range(1, COUNT, "none"), Unset(0)]
    relative_buckets: Annotated[int, Range(4, 2**16), Unset(32)]
    relative_distance: Annotated[int, Range(2, 2**20), Unset(128)]
    qk_norm: Annotated[bool, Unset(True, always=True)]
    qk_norm_over: Annotated[str, Unset("head")]
    norm_at: Annotated[str, Unset("input")]
    scale_embedding: Annotated[bool, Unset(False)]
    score_dim: Annotated[int, Range(1, 2**20, "head_dim"), Unset(0)]
    use_bias: Annotated[bool, Unset(False, always=True)]
    qkv_bias: Annotated[bool, Unset(False)]
    window: Annotated[int, Range(1, COUNT, "none"), Unset(0)]
    global_every: Annotated[int, Range(1, 10_000, "none"), Unset(0)]
    attention_softcap: Annotated[float, Range(1e-3, 1e6, "none"), Unset(0.0)]
    attention_sinks: Annotated[bool, Unset(False)]

    def __post_init__(self) -> None:
        check_ranges("transformer", self, TransformerConfig)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The keys of the section `experts`, explained in `configs/base.py`."""

    num_experts: Annotated[int, Range(2, 2**16, "a feed-forward layer"), Unset(0)]
    experts_per_token: Annotated[int, Range(1, 2**10), Unset(2)]
    expert_dim: Annotated[int, Range(1, 2**24, "transformer.mlp_dim"), Unset(0)]
    shared_experts: Annotated[int, Range(1, 2**10, "none"), Unset(0)]
    normalize_gates: Annotated[bool, Unset(True)]
    balance_loss: Annotated[float, Range(0, 1e3), Unset(0.01)]
    router_z_loss: Annotated[float, Range(0, 1e3), Unset(0.001)]

    def __post_init__(self) -> None:
        check_ranges("experts", self, ExpertsConfig)


@dataclasses.dataclass(frozen=True)
class BlockConfig(ExpertsConfig, TransformerConfig, ModelConfig):
    """The keys of the three sections, as the layers of a Transformer read them."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        TransformerConfig.__post_init__(self)
        ExpertsConfig.__post_init__(self)


def block_config(model: ModelConfig, transformer: TransformerConfig, experts: ExpertsConfig) -> BlockConfig:
    """The keys of the three sections in one object."""
    return BlockConfig(**vars(model), **vars(transformer), **vars(experts))


def resolve(config: BlockConfig) -> BlockConfig:
    """`config` with derived sizes filled in. Raises UserError if keys contradict each other."""
    for key, choices in CHOICES.items():
        choose(dict.fromkeys(choices), f"transformer.{key}", getattr(config, key))
    if config.global_every and not config.window:
        raise UserError(
            f"transformer.global_every={config.global_every} makes layers global that are so without a window; "
            "set transformer.window or transformer.global_every=0"
        )
    if config.use_bias and config.qkv_bias:
        raise UserError(
            "transformer.qkv_bias=True is without effect for transformer.use_bias=True, which has these biases too; "
            "leave it at False"
        )
    if config.qk_norm_over == "all" and not config.qk_norm:
        raise UserError(
            "transformer.qk_norm_over='all' is without effect for transformer.qk_norm=False; set that or leave it at "
            "'head'"
        )
    if config.local_rope_theta and not (config.window and POSITIONS[config.position].rotates):
        raise UserError(
            f"transformer.local_rope_theta={config.local_rope_theta:g} is for layers with a window and rotary "
            "positions, which this model does not have; set both or leave it at 0"
        )
    _check_rope_scaling(config)
    _check_relative(config)
    # 0 means multi-head attention: as many key/value heads as query heads.
    kv_heads = config.num_kv_heads or config.num_heads
    if config.num_heads % kv_heads:
        raise UserError(
            f"transformer.num_heads={config.num_heads} must be a multiple of transformer.num_kv_heads={kv_heads}; "
            f"change one of them"
        )
    if not config.head_dim and config.model_dim % config.num_heads:
        raise UserError(
            f"transformer.num_heads={config.num_heads} does not divide model.model_dim={config.model_dim}; "
            "change one of them or set transformer.head_dim"
        )
    head_dim = config.head_dim or config.model_dim // config.num_heads
    mlp_dim = config.mlp_dim or ACTIVATIONS[config.activation].width(config.model_dim)
    expert_dim = config.expert_dim or (mlp_dim if config.num_experts else 0)
    config = dataclasses.replace(
        config, num_kv_heads=kv_heads, head_dim=head_dim, mlp_dim=mlp_dim, expert_dim=expert_dim
    )
    if config.num_experts and config.experts_per_token > config.num_experts:
        raise UserError(
            f"experts.experts_per_token={config.experts_per_token} is more than experts.num_experts="
            f"{config.num_experts}; change one of them"
        )
    even = POSITIONS[config.position].even
    section, size = ("model", config.model_dim) if even == "model_dim" else ("transformer", head_dim)
    if even and size % 2:
        raise UserError(
            f"{section}.{even}={size} must be even for transformer.position={config.position!r}; "
            f"change it or the position"
        )
    # The exponent H / (H - 2) of `ops/rope.py` is not defined for H = 2.
    if config.rope_scaling == "ntk" and head_dim < 4:
        raise UserError(
            f"transformer.head_dim={head_dim} has a single frequency, which transformer.rope_scaling='ntk' must both "
            "keep and lower; use wider heads or another scaling"
        )
    return config


def _check_rope_scaling(config: TransformerConfig) -> None:
    """Raises UserError if the keys of RoPE scaling do not fit together."""
    scaling, reads_length = config.rope_scaling, SCALINGS[config.rope_scaling].reads_length
    if scaling == "none":
        for key in ("rope_factor", "rope_original_len"):
            if getattr(config, key) != (value := unset(TransformerConfig)[key]):
                raise UserError(
                    f"transformer.{key}={getattr(config, key)} is without effect for transformer.rope_scaling='none'; "
                    f"set transformer.rope_scaling or leave it at {value}"
                )
        return
    if not POSITIONS[config.position].rotates:
        raise UserError(
            f"transformer.rope_scaling={scaling!r} needs transformer.position='rope', not {config.position!r}; "
            "change one of them"
        )
    if reads_length != (config.rope_original_len > 0):
        rule = "needs" if reads_length else "does not read"
        raise UserError(
            f"transformer.rope_scaling={scaling!r} {rule} transformer.rope_original_len, which is "
            f"{config.rope_original_len}; set it to {'the T that the model was trained at' if rule == 'needs' else '0'}"
        )


def _check_relative(config: TransformerConfig) -> None:
    """Raises UserError if the keys of rotary and relative positions do not fit together."""
    theta = unset(TransformerConfig)["rope_theta"]
    if not POSITIONS[config.position].rotates and config.rope_theta != theta:
        raise UserError(
            f"transformer.rope_theta={config.rope_theta} is without effect for transformer.position="
            f"{config.position!r}; set transformer.position='rope' or leave it at {theta}"
        )
    buckets, distance = config.relative_buckets, config.relative_distance
    if POSITIONS[config.position].biases != "learned":
        for key in ("relative_buckets", "relative_distance"):
            if getattr(config, key) != (value := unset(TransformerConfig)[key]):
                raise UserError(
                    f"transformer.{key}={getattr(config, key)} is without effect for transformer.position="
                    f"{config.position!r}; set transformer.position='relative' or leave it at {value}"
                )
    elif buckets % 2 or distance <= buckets // 2:
        raise UserError(
            f"transformer.relative_buckets={buckets} must be even and less than twice transformer.relative_distance="
            f"{distance}; change one of them"
        )


def layer_windows(config: BlockConfig) -> tuple[int, ...]:
    """The attention window of each layer; 0 means that the layer is global.

    Counting layers from 1, every layer whose number is a multiple of `global_every` is global.
    """
    every = config.global_every
    return tuple(0 if every and i % every == 0 else config.window for i in range(1, config.num_layers + 1))
