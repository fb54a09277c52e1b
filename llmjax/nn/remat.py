"""What the backward pass of a layer keeps, does again, and has from the host's memory: one table for the choice, the
code and the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from llmjax.errors import choose
from llmjax.ops.attention.kernel import SAVED

RESIDUAL = "residual"  # the name of a layer's input, for remat and offload


@dataclasses.dataclass(frozen=True)
class Widths:
    """Numbers that a layer has for each token: of its input, of what its heads found, of the outputs of its matrix
    products, and of all that a backward pass without remat keeps."""

    residual: float
    heads: float
    products: float
    everything: float


@dataclasses.dataclass(frozen=True)
class Offload:
    """What `compute.offload` moves.

    names  of the arrays in the layer (`checkpoint_name`)
    width  the numbers of a token that no longer lie on the device
    """

    names: tuple[str, ...]
    width: Callable[[Widths], float]


OFFLOADS = {
    "residual": Offload((RESIDUAL,), lambda w: w.residual),
    "attention": Offload(SAVED, lambda w: w.heads),
}


def _everything(offload: tuple[str, ...]) -> None:
    return None


def _products(offload: tuple[str, ...]) -> Any:
    return {"policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def _named(*kept: str) -> Callable[[tuple[str, ...]], Any]:
    """Keeps the arrays of these names, and the layer's input."""

    def options(offload: tuple[str, ...]) -> Any:
        if not kept and not offload:
            return {}
        moved = [name for key in offload for name in choose(OFFLOADS, "compute.offload", key).names]
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name for name in kept if name not in moved],
            names_which_can_be_offloaded=moved,
            offload_src="device",
            offload_dst="pinned_host",
        )
        return {"policy": policy}

    return options


@dataclasses.dataclass(frozen=True)
class Remat:
    """One value of `compute.remat`.

    options    of `jax.checkpoint` around a layer, for what `compute.offload` names; None: no checkpoint around it
    width      the numbers of a token that a layer keeps until its backward pass
    recomputes the backward pass does a layer again, which then exists in full
    offloads   what of it `compute.offload` may name
    """

    options: Callable[[tuple[str, ...]], Any]
    width: Callable[[Widths], float]
    recomputes: bool = True
    offloads: tuple[str, ...] = ()


REMATS = {
    "none": Remat(_everything, lambda w: w.everything, recomputes=False),
    "dots": Remat(_products, lambda w: w.products),
    "attention": Remat(_named(*SAVED), lambda w: w.residual + w.heads, offloads=("residual", "attention")),
    "full": Remat(_named(), lambda w: w.residual, offloads=("residual",)),
}


def remat(layer: Callable[..., jax.Array], name: str, offload: tuple[str, ...]) -> Callable[..., jax.Array]:
    """`layer` whose backward pass does again what `compute.remat=name` does not keep, and has what `offload` names from
    the host's memory."""
    options = choose(REMATS, "compute.remat", name).options(offload)
    return layer if options is None else jax.checkpoint(layer, **options)


def kept_width(name: str, offload: tuple[str, ...], widths: Widths, num_layers: int) -> float:
    """The numbers of a token that all layers keep on the device, and one layer in full where it is done again."""
    chosen = choose(REMATS, "compute.remat", name)
    moved = sum(choose(OFFLOADS, "compute.offload", key).width(widths) for key in offload)
    return num_layers * (chosen.width(widths) - moved) + chosen.recomputes * widths.everything
