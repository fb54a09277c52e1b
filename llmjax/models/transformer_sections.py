"""What families of Transformers say of their sections of the config: sizes that follow from others, and facts."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmjax.errors import UserError
from llmjax.models.family import Sections
from llmjax.nn.config import ExpertsConfig, ModelConfig, TransformerConfig, block_config, resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.nn.position import POSITIONS
from llmjax.ranges import check_unread


def resolve_sections(model: ModelConfig, sections: Sections, seq_len: int, compute: LayerCompute) -> Sections:
    """The sections with derived sizes filled in. UserError for keys that contradict each other."""
    if not sections["experts"].num_experts:
        check_unread("experts", sections["experts"], "experts.num_experts=0", "experts.num_experts")
    elif compute.tile:
        raise UserError(
            f"compute.tile={compute.tile} computes feed-forward layers in tiles, and experts.num_experts="
            f"{sections['experts'].num_experts} sorts all tokens; set compute.tile=0"
        )
    return {**sections, **resolve_blocks(model, sections["transformer"], sections["experts"], seq_len)}


def resolve_blocks(
    model: ModelConfig, transformer: TransformerConfig, experts: ExpertsConfig, seq_len: int
) -> Sections:
    """The sections `transformer` and `experts` with derived sizes filled in."""
    config = resolve(block_config(model, transformer, experts))

    def own(section: type) -> dict[str, Any]:
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(section)}

    if config.window > seq_len:
        raise UserError(
            f"transformer.window={config.window} is longer than data.seq_len={seq_len}; use at most {seq_len}, "
            "or 0 for no window"
        )
    return {
        "transformer": TransformerConfig(**own(TransformerConfig)),
        "experts": ExpertsConfig(**own(ExpertsConfig)),
    }


def split_sizes(sections: Sections) -> dict[str, int]:
    """The sizes that mesh.tensor must divide, by their whole keys."""
    transformer, experts = sections["transformer"], sections["experts"]
    sizes = {
        f"transformer.{key}": getattr(transformer, key) for key in ("num_heads", "num_kv_heads", "mlp_dim")
    }
    if experts.num_experts:
        del sizes["transformer.mlp_dim"]
        sizes["experts.expert_dim"] = experts.expert_dim
    return sizes


def heads_of(sections: Sections) -> tuple[int, int]:
    """The numbers of query heads and of key/value heads."""
    return sections["transformer"].num_heads, sections["transformer"].num_kv_heads


def position_bias_of(sections: Sections) -> bool:
    """Whether positions are a bias of attention."""
    return bool(POSITIONS[sections["transformer"].position].biases)


def position_table_of(sections: Sections) -> str:
    """The setting by which positions are embeddings in a table, if they are."""
    position = sections["transformer"].position
    return f"transformer.position={position!r}" if POSITIONS[position].table else ""
