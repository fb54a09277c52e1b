"""The `model` section of a config: the shape of a model, its derived sizes, and the rules between its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Annotated

from llmjax.errors import UserError, choose
from llmjax.nn.position import POSITIONS
from llmjax.ops.activation import ACTIVATIONS
from llmjax.ops.norm import NORMS
from llmjax.ops.rope import SCALINGS
from llmjax.ranges import COUNT, Range, Unset, check_ranges, unset

# The names that a key may have. `model.family` is not among them: its table lies above, in `models/table.py`.
CHOICES: dict[str, Collection[str]] = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "position": POSITIONS,
    "rope_scaling": SCALINGS,
    "dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The keys of the section `model`, explained in `configs/base.py`. `resolve` replaces sizes of 0 by their
    defaults."""

    family: str
    num_layers: Annotated[int, Range(1, 10_000)]
    model_dim: Annotated[int, Range(1, 2**20)]
    num_heads: Annotated[int, Range(1, 2**16)]
    num_kv_heads: Annotated[int, Range(1, 2**16, "num_heads")]
    head_dim: Annotated[int, Range(1, 2**20, "the default")]
    mlp_dim: Annotated[int, Range(1, 2**24, "the default")]
    activation: str
    norm: str
    norm_eps: Annotated[float, Range(1e-30, 1.0)]
    position: str
    rope_theta: Annotated[float, Range(1, 1e15, above=True)]
    rope_scaling: Annotated[str, Unset("none")]
    rope_factor: Annotated[float, Range(1, 1e6), Unset(1.0)]
    rope_original_len: Annotated[int, Range(1, COUNT, "none"), Unset(0)]
    qk_norm: bool
    use_bias: bool
    tie_embeddings: bool
    logit_softcap: Annotated[float, Range(1e-3, 1e6, "none")]
    window: Annotated[int, Range(1, COUNT, "none"), Unset(0)]
    global_every: Annotated[int, Range(1, 10_000, "none"), Unset(0)]
    attention_softcap: Annotated[float, Range(1e-3, 1e6, "none"), Unset(0.0)]
    attention_sinks: Annotated[bool, Unset(False)]
    dropout: Annotated[float, Range(0, 1, below=True)]
    init_std: Annotated[float, Range(1e-10, 1e3)]
    dtype: str

    def __post_init__(self) -> None:
        check_ranges("model", self)


def resolve(config: ModelConfig) -> ModelConfig:
    """`config` with derived sizes filled in. Raises UserError if keys contradict each other."""
    for key, choices in CHOICES.items():
        choose(dict.fromkeys(choices), f"model.{key}", getattr(config, key))
    if config.global_every and not config.window:
        raise UserError(
            f"model.global_every={config.global_every} makes layers global that are so without a window; "
            "set model.window or model.global_every=0"
        )
    _check_rope_scaling(config)
    # 0 means multi-head attention: as many key/value heads as query heads.
    kv_heads = config.num_kv_heads or config.num_heads
    if config.num_heads % kv_heads:
        raise UserError(
            f"model.num_heads={config.num_heads} must be a multiple of model.num_kv_heads={kv_heads}; "
            f"change one of them"
        )
    if not config.head_dim and config.model_dim % config.num_heads:
        raise UserError(
            f"model.num_heads={config.num_heads} does not divide model.model_dim={config.model_dim}; "
            "change one of them or set model.head_dim"
        )
    head_dim = config.head_dim or config.model_dim // config.num_heads
    mlp_dim = config.mlp_dim or ACTIVATIONS[config.activation].width(config.model_dim)
    config = dataclasses.replace(config, num_kv_heads=kv_heads, head_dim=head_dim, mlp_dim=mlp_dim)
    even = POSITIONS[config.position].even
    if even and getattr(config, even) % 2:
        raise UserError(
            f"model.{even}={getattr(config, even)} must be even for model.position={config.position!r}; "
            f"change it or the position"
        )
    # The exponent H / (H - 2) of `ops/rope.py` is not defined for H = 2.
    if config.rope_scaling == "ntk" and head_dim < 4:
        raise UserError(
            f"model.head_dim={head_dim} has a single frequency, which model.rope_scaling='ntk' must both keep and "
            "lower; use wider heads or another scaling"
        )
    return config


def _check_rope_scaling(config: ModelConfig) -> None:
    """Raises UserError if the keys of RoPE scaling do not fit together."""
    scaling, reads_length = config.rope_scaling, SCALINGS[config.rope_scaling].reads_length
    if scaling == "none":
        for key in ("rope_factor", "rope_original_len"):
            if getattr(config, key) != (value := unset(ModelConfig)[key]):
                raise UserError(
                    f"model.{key}={getattr(config, key)} is without effect for model.rope_scaling='none'; "
                    f"set model.rope_scaling or leave it at {value}"
                )
        return
    if not POSITIONS[config.position].rotates:
        raise UserError(
            f"model.rope_scaling={scaling!r} needs model.position='rope', not {config.position!r}; change one of them"
        )
    if reads_length != (config.rope_original_len > 0):
        rule = "needs" if reads_length else "does not read"
        raise UserError(
            f"model.rope_scaling={scaling!r} {rule} model.rope_original_len, which is {config.rope_original_len}; "
            f"set it to {'the T that the model was trained at' if rule == 'needs' else '0'}"
        )


def layer_windows(config: ModelConfig) -> tuple[int, ...]:
    """The attention window of each layer; 0 means that the layer is global.

    Counting layers from 1, every layer whose number is a multiple of `global_every` is global.
    """
    every = config.global_every
    return tuple(0 if every and i % every == 0 else config.window for i in range(1, config.num_layers + 1))
