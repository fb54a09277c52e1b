"""The shape of a model: the `model` section of a config, with its derived sizes and their rules."""

from __future__ import annotations

import dataclasses

from llmjax.errors import UserError

CHOICES = {
    "family": ("gpt",),
    "activation": ("swiglu", "gelu", "relu2"),
    "norm": ("rmsnorm", "layernorm"),
    "position": ("rope", "learned", "sinusoidal"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "full", "blockwise"),
    "dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Keys as in `configs/base.py`. After `resolve` no size is 0."""

    family: str = "gpt"
    num_layers: int = 4
    model_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 0
    activation: str = "swiglu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    position: str = "rope"
    rope_theta: float = 10000.0
    qk_norm: bool = True
    use_bias: bool = False
    tie_embeddings: bool = True
    logit_softcap: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.02
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "auto"
    dtype: str = "float32"


def resolve(config: ModelConfig) -> ModelConfig:
    """`config` with derived sizes filled in; UserError where a rule is broken."""
    for key, choices in CHOICES.items():
        value = getattr(config, key)
        if value not in choices:
            raise UserError(f"model.{key}={value!r} is not known; use one of {', '.join(choices)}")
    for key in ("num_layers", "model_dim", "num_heads"):
        if getattr(config, key) < 1:
            raise UserError(f"model.{key}={getattr(config, key)} must be at least 1")
    for key in ("num_kv_heads", "head_dim", "mlp_dim", "logit_softcap"):
        if getattr(config, key) < 0:
            raise UserError(f"model.{key}={getattr(config, key)} must not be negative; use 0 for the default")
    for key in ("norm_eps", "init_std", "rope_theta"):
        if not getattr(config, key) > 0:
            raise UserError(f"model.{key}={getattr(config, key)} must be greater than 0")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout={config.dropout} must lie in [0, 1)")
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
    if config.position == "rope" and head_dim % 2:
        raise UserError(
            f"model.head_dim={head_dim} must be even for model.position='rope'; change the head width"
        )
    if config.position == "sinusoidal" and config.model_dim % 2:
        raise UserError(f"model.model_dim={config.model_dim} must be even for model.position='sinusoidal'")
    if config.activation == "swiglu":
        mlp_dim = config.mlp_dim or -(-config.model_dim * 8 // 3 // 64) * 64
    else:
        mlp_dim = config.mlp_dim or 4 * config.model_dim
    return dataclasses.replace(config, num_kv_heads=kv_heads, head_dim=head_dim, mlp_dim=mlp_dim)
