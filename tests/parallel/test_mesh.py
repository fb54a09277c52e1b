"""The mesh: four axes, whose sizes multiply to the devices there are, or one sentence that says why not."""

import itertools
import math

import jax
import pytest
from jax.sharding import AxisType
from sections import mesh_section

from llmjax.errors import UserError
from llmjax.parallel.mesh import AXES, across_slices, make_mesh, mesh_shape
from llmjax.plan.topology import topology_devices


@pytest.mark.parametrize("free", AXES)
def test_minus_one_takes_the_devices_that_are_left(free):
    sizes = dict(zip(AXES, (2, 1, 3, 1), strict=True)) | {free: -1}
    others = math.prod(size for size in sizes.values() if size != -1)
    shape = mesh_shape(mesh_section(**sizes), 5 * others)
    assert dict(zip(AXES, shape, strict=True)) == sizes | {free: 5}


def test_every_accepted_shape_uses_every_device():
    for sizes in itertools.product((-1, 1, 2, 3, 4, 8), repeat=4):
        try:
            shape = mesh_shape(mesh_section(*sizes), 8)
        except UserError:
            continue
        assert math.prod(shape) == 8
        assert all(got == asked for got, asked in zip(shape, sizes, strict=True) if asked != -1)


@pytest.mark.parametrize("sizes, devices, message", [
    ((0, 1, 1, 1), 8, "mesh.data=0 must be at least 1; use -1 for all that is left or a value from 1"),
    ((1, 1, -2, 1), 8, "mesh.seq=-2 must be at least 1; use -1 for all that is left or"),
    ((-1, 1, 1, -1), 8, "mesh.data=-1 and mesh.tensor=-1 leave the mesh open"),
    ((-1, 3, 1, 1), 8, "leaves 8 devices / 3 for mesh.data, which is no whole number"),
    ((2, 2, 1, 1), 8, "takes 4 devices but there are 8"),
    ((16, 1, 1, 1), 8, "takes 16 devices but there are 8"),
])  # fmt: skip
def test_a_shape_that_does_not_fit_is_one_sentence(sizes, devices, message):
    with pytest.raises(UserError, match=message) as error:
        mesh_shape(mesh_section(*sizes), devices)
    assert "\n" not in str(error.value)


def test_the_mesh_always_has_all_axes_and_leaves_sharding_to_the_compiler():
    mesh = make_mesh(mesh_section(data=2, fsdp=-1, seq=2))
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 2, "fsdp": 2, "seq": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]
    assert make_mesh(mesh_section(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize("shape, slices, across", [
    ((8, 1, 1, 1), 2, (2, 1, 1, 1)), ((4, 2, 1, 1), 4, (4, 1, 1, 1)), ((1, 8, 2, 1), 4, (1, 4, 1, 1)),
    ((3, 2, 2, 1), 2, (1, 2, 1, 1)),
])  # fmt: skip
def test_slices_lie_along_the_axis_that_communicates_least(shape, slices, across):
    assert across_slices(shape, slices) == across


@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (1, 1, 2, 4), (3, 3, 2, 1)])
def test_sequences_and_tensors_are_not_split_over_slices(shape):
    with pytest.raises(UserError, match="make mesh.data or mesh.fsdp a multiple of 2") as error:
        across_slices(shape, 2)
    assert "\n" not in str(error.value)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "sizes", [{"data": -1}, {"data": 1, "fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_a_mesh_over_slices_keeps_each_slice_together(sizes):
    devices = topology_devices("v5e:2x2*2")
    mesh = make_mesh(mesh_section(**sizes), devices)
    assert set(mesh.devices.flat) == set(devices)
    assert all(len({d.slice_index for d in half.flat}) == 1 for half in mesh.devices.reshape(2, 4))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v5p:4x4x4", "v6e:8x8"])
def test_any_shape_has_a_place_on_a_torus(name):
    devices = topology_devices(name)
    powers = [2**i for i in range(7)]
    for shape in itertools.product(powers, repeat=4):
        if math.prod(shape) == len(devices):
            mesh = make_mesh(mesh_section(*shape), devices)
            assert mesh.devices.shape == shape and set(mesh.devices.flat) == set(devices)
