"""The table from logical axes to mesh axes, and the `Layout` that applies it.

A model names what each dimension is (`batch`, `length`, `mlp`). Only this table says which mesh axes split such a
dimension, and what role it has in a parameter. Everything about a parameter follows from the names of its dimensions.
Parameters and activations share the table: `embed` is a dimension of parameters, which is split, and activations use
None for the same width. Devices that share a sequence also share the parameters, as the devices of `fsdp` do.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Axis:
    """A logical axis.

    mesh  the mesh axes that split it; if empty, every device has all of it
    side  its role in a parameter. "inputs": a matrix product sums over it. "outputs": it does not. "rows": a token id
          or position selects one row. "classes": the output head chooses among its entries. "stack": each entry is a
          separate parameter. "": only activations have such a dimension
    """

    mesh: tuple[str, ...] = ()
    side: str = ""


RULES: dict[str, Axis] = {
    "batch": Axis(("data", "fsdp")),
    "length": Axis(("seq",)),
    "source_length": Axis(("seq",)),
    "layers": Axis((), "stack"),
    "vocab": Axis(("tensor",), "rows"),
    "positions": Axis((), "rows"),
    "token_types": Axis((), "rows"),
    "classes": Axis(("tensor",), "classes"),
    # The classes of a text. They are few, and their number is any, so that every device has all of them.
    "labels": Axis((), "classes"),
    # Dimensions of matrices along the residual stream: `embed` reads from it, `residual` adds to it.
    "embed": Axis(("fsdp", "seq"), "inputs"),
    "residual": Axis(("fsdp", "seq"), "outputs"),
    # Dimensions inside of a layer: outputs of its first matrices, and (names in _in) inputs of its last ones.
    "heads": Axis(("tensor",), "outputs"),
    "kv_heads": Axis(("tensor",), "outputs"),
    "head_dim": Axis((), "outputs"),
    "heads_in": Axis(("tensor",), "inputs"),
    "head_dim_in": Axis((), "inputs"),
    "mlp": Axis(("tensor",), "outputs"),
    "mlp_in": Axis(("tensor",), "inputs"),
    # Dimensions of a mixture of experts: each expert has matrices of its own, and the router chooses among them.
    "experts": Axis((), "stack"),
    "router": Axis((), "outputs"),
    # The inner dimension of an adapter: what its first matrix gives, and what its second one reads.
    "rank": Axis((), "outputs"),
    "rank_in": Axis((), "inputs"),
    # Dimensions of a recurrent layer. Its four gates have a matrix each, and `recurrent` reads the state of the layer.
    "gates": Axis((), "stack"),
    "recurrent": Axis(("fsdp", "seq"), "inputs"),
    # Vectors along the residual stream or a head: small, so every device has all of them.
    "feature": Axis((), "outputs"),
}


def is_axes(x: object) -> bool:
    """Whether `x` is a leaf of a tree of logical axes: a tuple of names."""
    return isinstance(x, tuple)


def _axis(name: str) -> Axis:
    """The entry of the table for `name`. Raises UserError if there is none."""
    if name not in RULES:
        raise UserError(f"logical axis {name!r} is not in the rules table; use one of {', '.join(RULES)}")
    return RULES[name]


def side_of(name: str) -> str:
    """The role of the logical axis `name` in a parameter, see `Axis`. Raises UserError for an unknown name."""
    side = _axis(name).side
    if not side:
        raise UserError(
            f"logical axis {name!r} is one of activations; give this dimension of a parameter another"
        )
    return side


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec for logical `names`, one per dimension; None means not split.

    Raises UserError for an unknown name, and if two dimensions use the same mesh axis.
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
    """A mesh together with the rules. It is hashable, so modules can hold it. `mesh=None` means a single device.

    `manual` lists the mesh axes over which the caller has already split the arrays, with `jax.shard_map`. Inside,
    arrays are parts along these axes, so this layout treats each of them as having size 1.
    """

    mesh: Mesh | None = None
    manual: tuple[str, ...] = ()

    @property
    def platform(self) -> str:
        """The kind of the devices, such as `cpu` or `tpu`."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array with these logical dimensions. It needs a mesh."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, self._spec(names))

    def _spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        spec = partition_spec(names)
        return without_axes(spec, self.manual) if self.manual else spec

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x` with a sharding constraint from the table; unchanged on a single device."""
        if self.mesh is None or all(self.axis_size(axis) == 1 for axis in self.mesh.axis_names):
            return x
        if len(names) != x.ndim:
            raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
        # Inside of shard_map, a NamedSharding of this mesh would contradict the manual axes, so a bare PartitionSpec
        # is used, which refers to the surrounding mesh.
        return jax.lax.with_sharding_constraint(
            x, self._spec(names) if self.manual else self.sharding(*names)
        )

    def axis_size(self, axis: str) -> int:
        """The number of shards along the mesh axis `axis`."""
        return 1 if self.mesh is None or axis in self.manual else self.mesh.shape[axis]


def without_axes(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """`spec` without the mesh axes `axes`."""
    kept = [[] if entry is None else [entry] if isinstance(entry, str) else list(entry) for entry in spec]
    kept = [[axis for axis in entry if axis not in axes] for entry in kept]
    return PartitionSpec(
        *(None if not entry else entry[0] if len(entry) == 1 else tuple(entry) for entry in kept)
    )
