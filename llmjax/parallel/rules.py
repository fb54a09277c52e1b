"""The one table from logical axes to mesh axes, and the `Layout` that applies it.

Models name what a dimension is (`batch`, `length`, `mlp`). This table alone says where it lies, and what it does in a
parameter: all that is known of a parameter's role follows from the names of its dimensions. Parameters and activations
share the table, so `embed` is the sharded dimension of a parameter, and activations leave it `None`.
Devices that share a sequence share the parameters too, as the devices of `fsdp` do.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Axis:
    """A logical axis: the mesh axes that split it, and what a dimension of a parameter that has its name does.

    mesh  names of mesh axes; none: every device has all of it
    side  "inputs": the parameter is applied by a sum over this dimension. "outputs": it is not. "rows": the number of
          a token picks one row of it. "classes": the output head chooses among its entries. "stack": each entry is a
          parameter of its own. "": only activations have such a dimension
    """

    mesh: tuple[str, ...] = ()
    side: str = ""


RULES: dict[str, Axis] = {
    "batch": Axis(("data", "fsdp")),
    "length": Axis(("seq",)),
    "source_length": Axis(),
    "layers": Axis((), "stack"),
    "vocab": Axis(("tensor",), "rows"),
    "positions": Axis((), "rows"),
    "classes": Axis(("tensor",), "classes"),
    # What a matrix reads from the residual stream, and what it adds to it.
    "embed": Axis(("fsdp", "seq"), "inputs"),
    "residual": Axis(("fsdp", "seq"), "outputs"),
    # Inside of a layer: what its first matrices make, and the same where its last ones read it.
    "heads": Axis(("tensor",), "outputs"),
    "kv_heads": Axis(("tensor",), "outputs"),
    "head_dim": Axis((), "outputs"),
    "heads_in": Axis(("tensor",), "inputs"),
    "head_dim_in": Axis((), "inputs"),
    "mlp": Axis(("tensor",), "outputs"),
    "mlp_in": Axis(("tensor",), "inputs"),
    # Of vectors along the residual stream or a head, which are small and whole on every device.
    "feature": Axis((), "outputs"),
}


def is_axes(x: object) -> bool:
    """Whether `x` is a leaf of a tree of logical axes: a tuple of names."""
    return isinstance(x, tuple)


def _axis(name: str) -> Axis:
    if name not in RULES:
        raise UserError(f"logical axis {name!r} is not in the rules table; use one of {', '.join(RULES)}")
    return RULES[name]


def side_of(name: str) -> str:
    """What a dimension of a parameter does that is called `name`, see `Axis`; UserError where that is not known."""
    side = _axis(name).side
    if not side:
        raise UserError(
            f"logical axis {name!r} is one of activations; give this dimension of a parameter another"
        )
    return side


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes for logical `names`, one per dimension (None: replicated).

    Raises UserError for a name that the table lacks and where two dimensions claim the same mesh axis.
    """
    used: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for name in names:
        if name is None:
            entries.append(None)
            continue
        axes = _axis(name).mesh
        for axis in axes:
            if axis in used:
                raise UserError(
                    f"logical axes {used[axis]!r} and {name!r} of {names} both map to mesh axis {axis!r}; "
                    "name one of them None"
                )
            used[axis] = name
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the rules applied to it; hashable, so that modules can hold it. `mesh=None` means one device.

    `manual` are the axes over which the caller has split the arrays itself (`jax.shard_map`): what this layout
    is asked about is one part of them, so that for it those axes have one shard each.
    """

    mesh: Mesh | None = None
    manual: tuple[str, ...] = ()

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array whose dimensions are called `names`; only with a mesh."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, self._spec(names))

    def _spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        spec = partition_spec(names)
        return without_axes(spec, self.manual) if self.manual else spec

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x`, told to the compiler to live where the table says; the identity on one device."""
        if self.mesh is None or all(self.axis_size(axis) == 1 for axis in self.mesh.axis_names):
            return x
        if len(names) != x.ndim:
            raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
        # Within shard_map the mesh is the surrounding one, whose manual axes a NamedSharding of this one denies.
        return jax.lax.with_sharding_constraint(
            x, self._spec(names) if self.manual else self.sharding(*names)
        )

    def axis_size(self, axis: str) -> int:
        """The number of shards along mesh axis `axis`."""
        return 1 if self.mesh is None or axis in self.manual else self.mesh.shape[axis]


def without_axes(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """`spec` with the mesh axes `axes` taken out."""
    kept = [[] if entry is None else [entry] if isinstance(entry, str) else list(entry) for entry in spec]
    kept = [[axis for axis in entry if axis not in axes] for entry in kept]
    return PartitionSpec(
        *(None if not entry else entry[0] if len(entry) == 1 else tuple(entry) for entry in kept)
    )
