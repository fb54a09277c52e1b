"""How the layers of a model are computed: choices that change time and memory but no result."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.errors import UserError, choose
from llmjax.nn.remat import OFFLOADS, REMATS
from llmjax.ops.attention.sequence_attention import ATTENTION
from llmjax.ranges import COUNT, Range, Unset


@dataclasses.dataclass(frozen=True)
class LayerCompute:
    """The keys of the section `compute` that a model reads.

    scan_layers  compile one layer and scan over it, instead of compiling each layer
    remat        what the backward pass recomputes, see `remat.REMATS`
    offload      which saved activations are kept in host memory, see `remat.OFFLOADS`
    tile         the most tokens per device that the token-wise parts of a layer process at a time; 0 means all
    kernel       the attention kernel on each device, see `sequence_attention.ATTENTION`

    Raises UserError for an unknown value.
    """

    scan_layers: bool = False
    remat: str = "none"
    offload: Annotated[tuple[str, ...], Unset(())] = ()
    tile: Annotated[int, Range(1, COUNT, "none"), Unset(0)] = 0
    kernel: str = "auto"

    def __post_init__(self) -> None:
        choose(REMATS, "compute.remat", self.remat)
        choose(ATTENTION, "compute.kernel", self.kernel)
        for name in self.offload:
            if name not in OFFLOADS:
                raise UserError(
                    f"compute.offload has {name!r}, which is not known; use some of {', '.join(OFFLOADS)}"
                )
            if name not in REMATS[self.remat].offloads:
                allowed = " or ".join(remat for remat, facts in REMATS.items() if name in facts.offloads)
                raise UserError(
                    f"compute.offload has {name!r}, which compute.remat={self.remat!r} does not keep; "
                    f"use compute.remat={allowed}"
                )
