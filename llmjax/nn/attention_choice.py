"""Chooses the attention of a model: the kernel on each device, and the way in which devices share a sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmjax.errors import UserError, choose
from llmjax.ops.attention.sequence_attention import ATTENTION, KERNELS, Sharing, adds_bias
from llmjax.parallel.mesh import MeshConfig


def choose_kernel(name: str, platform: str, biased: bool) -> tuple[str, str]:
    """The kernel for compute.kernel=`name` on `platform` (cpu, gpu or tpu), and the reason, for the plan.

    `biased` says whether attention adds a bias of positions to its scores. Raises UserError if the kernel does not
    exist for the platform, or adds no such bias.
    """
    kernels = choose(ATTENTION, "compute.kernel", name)
    kernel = kernels.get(platform, kernels.get(""))
    if kernel is None:
        platforms = " or a ".join(name.upper() for name in kernels)
        others = " or ".join(
            other for other, of in ATTENTION.items() if (platform in of or "" in of) and other != "full"
        )
        raise UserError(
            f"compute.kernel={name!r} needs a {platforms}, not a {platform.upper()}; use {others}"
        )
    if biased and not adds_bias(kernel):
        if name == "auto":
            return next(filter(adds_bias, KERNELS)), "the kernel that adds transformer.position='relative'"
        others = " or ".join(filter(adds_bias, ("full", *KERNELS)))
        raise UserError(
            f"compute.kernel={name!r} cannot add the bias of transformer.position='relative'; use auto or {others}"
        )
    return (
        kernel,
        f"the kernel for a {platform.upper()}" if name == "auto" else "as compute.kernel says",
    )


def choose_sharing(
    heads: tuple[int, int] | None, kernel: str, mesh: MeshConfig, sizes: Mapping[str, int], biased: bool
) -> tuple[Sharing | None, str]:
    """How the devices along mesh.seq share a sequence (None if each device has whole sequences), and the reason, for
    the plan.

    heads   the numbers of query heads and of key/value heads of the model; None if it has no attention
    kernel  the value of compute.kernel
    sizes   the sizes of the mesh axes
    biased  whether attention adds a bias of positions to its scores

    `auto` uses Ulysses as long as there are enough key/value heads for the devices, because it sends the least and
    its work does not depend on document lengths. It uses a ring for the rest, or gathers all keys where a ring cannot
    be. Raises UserError for a combination that does not work.
    """
    n, name, degree = sizes["seq"], mesh.seq_attention, mesh.ulysses
    others = tuple(axis for axis in ("data", "fsdp") if sizes[axis] > 1)
    if degree and name != "hybrid":
        raise UserError(
            f"mesh.ulysses={degree} is without effect for mesh.seq_attention={name!r}; use hybrid or mesh.ulysses=0"
        )
    if n == 1:
        return None, "whole sequences on each device"
    if heads is None:
        raise UserError(
            f"mesh.seq={n} splits sequences, which this model.family reads from the first token to the last; "
            "use mesh.data or mesh.fsdp"
        )
    N, K = (number // sizes["tensor"] for number in heads)
    why = "as mesh.seq_attention says"
    # The number of devices among which the key/value heads can be divided without repeating any.
    dealt = math.gcd(K, n)
    if name == "auto":
        why = f"{K} key/value heads a device for {n} devices"
        name = "ulysses" if dealt == n else "hybrid" if dealt > 1 else "ring"
        if biased and name != "ulysses":
            name, why = "gather", "a ring cannot add transformer.position='relative'"
        elif kernel == "full" and name != "ulysses":
            name, why = "gather", "full attention needs all keys at once"
    if name in ("ring", "hybrid") and biased:
        raise UserError(
            f"mesh.seq_attention={name!r} cannot add the bias of transformer.position='relative'; use auto, gather or "
            "ulysses"
        )
    if name in ("ring", "hybrid") and kernel == "full":
        raise UserError(
            f"compute.kernel='full' needs all keys at once, which mesh.seq_attention={name!r} brings in parts; use "
            "gather or ulysses, or another compute.kernel"
        )
    traded = choose(TRADED, "mesh.seq_attention", name)(degree, N, dealt, n)
    return Sharing(name, "seq", n, traded, others), why


def _none(degree: int, N: int, dealt: int, n: int) -> int:
    return 1


def _all(degree: int, N: int, dealt: int, n: int) -> int:
    if N % n:
        raise UserError(
            f"mesh.seq_attention='ulysses' cannot deal {N} query heads a device (transformer.num_heads / mesh.tensor) "
            f"to mesh.seq={n} devices; use ring or hybrid, or change one of them"
        )
    return n


def _some(degree: int, N: int, dealt: int, n: int) -> int:
    # A group exchanges query heads, so its size must divide both the devices and the query heads.
    possible = [u for u in range(2, n) if n % u == 0 and N % u == 0]
    if not possible or (degree and degree not in possible):
        hint = f"use one of {', '.join(map(str, possible))}" if possible else "use ring or ulysses"
        raise UserError(
            f"mesh.seq_attention='hybrid' with mesh.ulysses={degree} cannot deal {N} query heads a device "
            f"(transformer.num_heads / mesh.tensor) in groups of the mesh.seq={n} devices; {hint}"
        )
    # By default the largest group whose members get whole key/value heads.
    return degree or max((u for u in possible if dealt % u == 0), default=possible[-1])


# The number of devices in a group that exchanges heads, for each algorithm. The arguments are mesh.ulysses, the query
# heads of a device, the devices among which its key/value heads can be divided, and the devices along mesh.seq.
TRADED = {"gather": _none, "ring": _none, "ulysses": _all, "hybrid": _some}
