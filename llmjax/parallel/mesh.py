"""The device mesh. It always has the same four axes, `data`, `fsdp`, `seq` and `tensor`; an unused axis has size 1.

`data` splits the batch and replicates the parameters. `fsdp` splits the batch and the parameters (ZeRO: Rajbhandari
et al. 2020). `seq` splits the positions of each sequence, and the parameters as well. `tensor` splits heads,
feed-forward layers and the vocabulary (Megatron-LM: Shoeybi et al. 2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmjax.ranges import Range, Unset, check_ranges
from llmjax.types import UserError

AXES = ("data", "fsdp", "seq", "tensor")
# The layouts of llmjax/data/layout/layout.py; `auto` chooses among them.
LAYOUTS = ("auto", "contiguous", "zigzag", "striped", "documents")
SEQ_ATTENTION = ("auto", "gather", "ring", "ulysses", "hybrid")


AXIS = Range(1, 2**20, all=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The sizes of the mesh axes. One of them may be -1, and takes all devices that remain.

    seq_attention  how devices along `seq` attend to keys on each other, see `ops/attention/sequence_attention.py`
    ulysses        the number of devices that exchange heads in `hybrid`; 0 means as many as the key/value heads allow
    layout         which tokens of a sequence lie on which device of `seq`
    """

    data: Annotated[int, AXIS]
    fsdp: Annotated[int, AXIS]
    seq: Annotated[int, AXIS]
    tensor: Annotated[int, AXIS]
    seq_attention: Annotated[str, Unset("auto")]
    ulysses: Annotated[int, Range(1, 2**20, "the default"), Unset(0)]
    layout: Annotated[str, Unset("auto")]

    def __post_init__(self):
        check_ranges("mesh", self)
        for key, choices in (("seq_attention", SEQ_ATTENTION), ("layout", LAYOUTS)):
            if getattr(self, key) not in choices:
                value = getattr(self, key)
                raise UserError(f"mesh.{key}={value!r} is not known; use one of {', '.join(choices)}")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """The four axis sizes for `num_devices`, with -1 filled in. Raises UserError if their product does not match."""
    # An axis of -1 takes the devices that the product of the others leaves.
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(
            f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1 leave the mesh open; give all but one of the axes a size"
        )
    product = math.prod(size for size in sizes.values() if size != -1)
    text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if free and num_devices % product:
        raise UserError(
            f"mesh {text} leaves {num_devices} devices / {product} for mesh.{free[0]}, which is no whole number; "
            f"change an axis so that their product divides {num_devices}"
        )
    if not free and product != num_devices:
        raise UserError(
            f"mesh {text} takes {product} devices but there are {num_devices}; make the product {num_devices} "
            "or set mesh.data=-1"
        )
    for axis in free:
        sizes[axis] = num_devices // product
    return tuple(sizes[axis] for axis in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (by default all), arranged to follow the physical network.

    Each axis gets whole dimensions of a TPU's torus if possible, otherwise parts of them. Slices of a TPU are
    connected by a slower network, so the axis that communicates least lies across them (`across_slices`).
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    # Linen needs automatic axes; jax would make them explicit by default.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1:
        across = across_slices(shape, slices)
        within = tuple(size // n for size, n in zip(shape, across))
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # The shape does not fit whole dimensions of the torus.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)


def across_slices(shape: tuple[int, int, int, int], slices: int) -> tuple[int, int, int, int]:
    """How the four axes are divided over `slices` slices: all on `data` if possible, otherwise on `fsdp`.

    Raises UserError if neither is a multiple of `slices`: sequences and tensors are not split over a slow network.
    """
    data, fsdp, _, _ = shape
    if data % slices == 0:
        return slices, 1, 1, 1
    if fsdp % slices == 0:
        return 1, slices, 1, 1
    raise UserError(
        f"mesh.data={data} and mesh.fsdp={fsdp} are no multiples of the {slices} slices, which one of them lies "
        f"across; make mesh.data or mesh.fsdp a multiple of {slices}"
    )
