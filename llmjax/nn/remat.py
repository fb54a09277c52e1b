"""What the backward pass of a layer keeps, recomputes, or fetches from host memory: one table for config, model and
plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from llmjax.errors import choose
from llmjax.ops.attention.kernel import SAVED

# What a layer returns.
Result = TypeVar("Result")
# The name of a layer's input, by which remat and offload policies refer to it.
RESIDUAL = "residual"


@dataclasses.dataclass(frozen=True)
class Widths:
    """Counts of numbers per token and layer, to estimate memory.

    residual    the input of the layer
    heads       the output of attention, before its projection
    products    the outputs of all matrix products
    everything  all that a backward pass without remat keeps
    """

    residual: float
    heads: float
    products: float
    everything: float


@dataclasses.dataclass(frozen=True)
class Offload:
    """One name in `compute.offload`.

    names  the arrays that move to host memory, by their `checkpoint_name`
    width  function of `Widths` to the numbers per token that no longer lie on the device
    """

    names: tuple[str, ...]
    width: Callable[[Widths], float]


OFFLOADS = {
    "residual": Offload((RESIDUAL,), lambda w: w.residual),
    "attention": Offload(SAVED, lambda w: w.heads),
}


def _everything(offload: tuple[str, ...]) -> None:
    """No `jax.checkpoint`: the backward pass keeps everything."""
    return None


def _products(offload: tuple[str, ...]) -> Any:
    """Keeps the outputs of matrix products with weights, and recomputes the rest."""
    return {"policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def _named(*kept: str) -> Callable[[tuple[str, ...]], Any]:
    """Keeps the layer's input and the arrays of these names, apart from those that are offloaded."""

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

    options     function of `compute.offload` to the arguments of `jax.checkpoint` around a layer; None for no
                checkpoint
    width       function of `Widths` to the numbers per token that a layer keeps until its backward pass
    recomputes  whether the backward pass recomputes a layer; during that time one layer exists in full
    offloads    which names `compute.offload` may contain
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


def remat(layer: Callable[..., Result], name: str, offload: tuple[str, ...]) -> Callable[..., Result]:
    """`layer`, wrapped so that its backward pass recomputes what `compute.remat=name` does not keep.

    `offload` names what it moves to host memory in the meantime.
    """
    options = choose(REMATS, "compute.remat", name).options(offload)
    return layer if options is None else jax.checkpoint(layer, **options)


def kept_width(name: str, offload: tuple[str, ...], widths: Widths, num_layers: int) -> float:
    """The numbers per token that all layers together keep on the device, plus one layer in full if layers are
    recomputed."""
    chosen = choose(REMATS, "compute.remat", name)
    # Offloaded arrays no longer count. One layer exists in full while the backward pass recomputes it.
    moved = sum(choose(OFFLOADS, "compute.offload", key).width(widths) for key in offload)
    return num_layers * (chosen.width(widths) - moved) + chosen.recomputes * widths.everything
