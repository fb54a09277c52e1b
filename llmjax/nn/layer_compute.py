"""How the layers of a model are computed: choices that change time and memory, and no number."""

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

    scan_layers  one compiled layer, scanned, in place of as many as there are
    remat        what the backward pass does again, see `remat.REMATS`
    offload      what of the rest lies in the memory of the host, see `remat.OFFLOADS`
    tile         tokens of a device that the token-wise parts of a layer take at a time; 0 = all
    kernel       of attention on each device, see `sequence_attention.ATTENTION`

    Raises UserError for a value that is not known.
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
