"""A tiny model of every family in a few variants, which the tests of the contract and of invariance loop over."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from configs.base import get_config
from llmjax.build.model import make_model
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.examples.contract import Examples, ExampleSetting
from llmjax.data.examples.table import EXAMPLES
from llmjax.models.contract import Model
from llmjax.models.table import FAMILIES
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout
from llmjax.tasks.contract import ReadsPairs
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
    "bert original": {
        "transformer.num_heads": 4, "transformer.mlp_dim": 32, "transformer.norm_at": "sum",
        "transformer.position": "learned", "transformer.norm": "layernorm", "transformer.norm_eps": 1e-12,
        "transformer.activation": "gelu_erf", "transformer.use_bias": True, "transformer.qk_norm": False,
        "bert.token_types": 2, "bert.embedding_norm": True, "bert.output_bias": True,
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
    "encoder_decoder": {"transformer.num_heads": 4, "transformer.mlp_dim": 32},
    "encoder_decoder original": {
        "transformer.num_heads": 4, "transformer.mlp_dim": 32, "transformer.norm_at": "sum",
        "transformer.position": "sinusoidal", "transformer.norm": "layernorm", "transformer.activation": "gelu",
        "transformer.use_bias": True, "transformer.qk_norm": False, "encoder_decoder.encoder_layers": 3,
        "translation.label_smoothing": 0.1, "compute.scan_layers": True, "data.source_len": 16,
    },
    "encoder_decoder t5": {
        "transformer.num_heads": 4, "transformer.mlp_dim": 32, "transformer.position": "relative",
        "transformer.relative_buckets": 8, "transformer.relative_distance": 12, "transformer.activation": "relu",
        "transformer.qk_norm": False, "transformer.head_dim": 8, "transformer.score_dim": 1,
        "encoder_decoder.scale_output": True, "encoder_decoder.output_bias": True, "data.source_len": 16,
    },
    "lstm": {},
    "lstm projected": {"lstm.hidden_dim": 24, "lstm.truncation": 7, "model.logit_softcap": 5.0},
    "lstm untied": {"lstm.hidden_dim": 24, "model.tie_embeddings": False, "compute.remat": "full"},
}  # fmt: skip
COMMON = {"model.num_layers": 2, "model.model_dim": 16, "model.init_std": 0.2, "data.seq_len": T}


def goes_with(family: str, task: str) -> bool:
    """Whether the task can train the family: whether the family sees and reads what the task has."""
    kind = FAMILIES[family]
    reads = "source" in columns_of(family, task) and not isinstance(TASKS[task], ReadsPairs)
    return TASKS[task].sees_both_sides in (None, kind.sees_both_sides) and kind.reads_source == reads


def columns_of(family: str, task: str) -> tuple[str, ...]:
    """The optional columns of the examples that the task makes for the family."""
    return examples_of(task, family).columns


def examples_of(task: str, family: str = "", text_field: str = "text", **changes: Any) -> Examples:
    """What makes the examples of a task for a family; `changes` are keys of the task's own section."""
    keys = read_config(get_config().to_dict()).tasks.get(task)
    keys = dataclasses.replace(keys, **changes) if changes else keys
    return EXAMPLES[task](
        ExampleSetting(text_field, T, keys, FAMILIES[family or family_for(task)].reads_source)
    )


def families_for(task: str) -> list[str]:
    """A family for each form that the examples of the task have."""
    first: dict[tuple[str, ...], str] = {}
    for family in FAMILIES:
        if goes_with(family, task):
            first.setdefault(columns_of(family, task), family)
    return list(first.values())


def family_for(task: str) -> str:
    """The first family that the task can train."""
    return families_for(task)[0]


def task_for(family: str) -> str:
    """The first task that can train the family."""
    return next(task for task in TASKS if goes_with(family, task))


def family_of(variant: str) -> str:
    """The family of a variant, which is the first word of its name."""
    return variant.split()[0]


def settings(variant: str) -> dict[str, Any]:
    """The keys of a config of this variant that differ from configs/base.py, {whole key: value}."""
    family = family_of(variant)
    return COMMON | VARIANTS[variant] | {"model.family": family, "task.name": task_for(family)}


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


def source_of(segments: np.ndarray, length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The source fields of a batch whose documents lie as in `segments`, [B, T]: `length` positions in each row."""
    names = ("source_tokens", "source_segments", "source_positions")
    arrays = {name: np.zeros((len(segments), length), np.int32) for name in names}
    for row, documents in enumerate(segments):
        count, start = documents.max(), 0
        for segment in range(1, count + 1):
            n = int(rng.integers(1, length // count + 1))
            arrays["source_tokens"][row, start : start + n] = rng.integers(1, V, n)
            arrays["source_segments"][row, start : start + n] = segment
            arrays["source_positions"][row, start : start + n] = np.arange(n)
            start += n
    return arrays


def _first_device() -> list[Any]:
    # Not at the top: jax may be set up only after this file is imported.
    import jax

    return jax.devices()[:1]
