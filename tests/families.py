"""A tiny model of every family in a few variants, which the tests of the contract and of invariance loop over."""

from __future__ import annotations

from typing import Any

from configs.base import get_config
from llmjax.build.model import make_model
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.models.contract import Model
from llmjax.models.table import FAMILIES
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout
from llmjax.tasks.table import TASKS

V, T = 64, 24
# Family and variant -> what the config of a tiny model of it has changed. Sizes are such that each of the mesh axes
# can split them in two.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": {"transformer.num_heads": 4, "transformer.num_kv_heads": 2, "transformer.mlp_dim": 32},
    "gpt learned": {
        "transformer.num_heads": 4, "transformer.position": "learned", "transformer.norm": "layernorm",
        "transformer.activation": "gelu", "transformer.use_bias": True, "transformer.mlp_dim": 32,
        "model.tie_embeddings": False, "compute.scan_layers": True,
    },
    "gpt experts": {
        "transformer.num_heads": 4, "experts.num_experts": 4, "experts.expert_dim": 16, "experts.shared_experts": 1,
    },
    "gpt experts scanned": {
        "transformer.num_heads": 4, "transformer.activation": "gelu", "experts.num_experts": 3,
        "experts.experts_per_token": 1, "experts.expert_dim": 16, "experts.normalize_gates": False,
        "compute.scan_layers": True,
    },
    "bert": {"transformer.num_heads": 4, "transformer.mlp_dim": 32},
    "bert local": {
        "transformer.num_heads": 4, "transformer.mlp_dim": 32, "transformer.window": 5, "transformer.global_every": 2,
        "transformer.activation": "gelu", "transformer.norm": "layernorm", "transformer.use_bias": True,
        "model.tie_embeddings": False, "masked_language_model.whole_words": True,
    },
    "gpt gemma": {
        "transformer.num_heads": 4, "transformer.num_kv_heads": 2, "transformer.mlp_dim": 32,
        "transformer.activation": "geglu", "transformer.norm_at": "both", "transformer.scale_embedding": True,
        "transformer.score_dim": 7, "transformer.window": 5, "transformer.global_every": 2,
        "transformer.local_rope_theta": 50.0, "model.logit_softcap": 5.0,
    },
    "gpt olmo2": {
        "transformer.num_heads": 4, "transformer.mlp_dim": 32, "transformer.norm_at": "output",
        "transformer.qk_norm_over": "all", "transformer.qkv_bias": True, "compute.tile": 16,
    },
    "lstm": {},
    "lstm projected": {"lstm.hidden_dim": 24, "lstm.truncation": 7, "model.logit_softcap": 5.0},
    "lstm untied": {"lstm.hidden_dim": 24, "model.tie_embeddings": False, "compute.remat": "full"},
}  # fmt: skip
COMMON = {"model.num_layers": 2, "model.model_dim": 16, "model.init_std": 0.2, "data.seq_len": T}


def family_for(task: str) -> str:
    """The first family that sees what the task allows it to see."""
    sight = TASKS[task].sees_both_sides
    return next(name for name, family in FAMILIES.items() if sight in (None, family.sees_both_sides))


def family_of(variant: str) -> str:
    """The family of a variant, which is the first word of its name."""
    return variant.split()[0]


def settings(variant: str) -> dict[str, Any]:
    """The keys of a config of this variant that differ from configs/base.py, {whole key: value}."""
    family = family_of(variant)
    task = "masked_language_model" if FAMILIES[family].sees_both_sides else "language_model"
    return COMMON | VARIANTS[variant] | {"model.family": family, "task.name": task}


def make(variant: str, **changes: Any) -> Model:
    """The model of this variant on one device; `a__b=v` changes the key a.b."""
    raw = get_config()
    raw.update_from_flattened_dict(
        settings(variant)
        | {"mesh.data": 1, "train.tokens_per_update": 2 * T}
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    config, derived = resolve_config(read_config(raw.to_dict()), 1)
    return make_model(config, derived, V, Layout(make_mesh(config.mesh, _first_device())))


def _first_device() -> list[Any]:
    # Not at the top: jax may be set up only after this file is imported.
    import jax

    return jax.devices()[:1]
