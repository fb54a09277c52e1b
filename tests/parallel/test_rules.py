"""The one table from what a dimension is to where it lives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sections import mesh_section

from llmjax.errors import UserError
from llmjax.parallel.mesh import AXES, make_mesh
from llmjax.parallel.rules import RULES, Layout, partition_spec, without_axes


def test_the_table_names_only_axes_of_the_mesh():
    assert {axis for rule in RULES.values() for axis in rule.mesh} == set(AXES)


@pytest.mark.parametrize("names, spec", [
    (("batch", "length"), PartitionSpec(("data", "fsdp"), "seq")),
    (("batch", "length", None), PartitionSpec(("data", "fsdp"), "seq", None)),
    (("embed", "heads", "head_dim"), PartitionSpec(("fsdp", "seq"), "tensor", None)),
    (("layers", "mlp", "embed"), PartitionSpec(None, "tensor", ("fsdp", "seq"))),
    ((), PartitionSpec()),
])  # fmt: skip
def test_names_become_mesh_axes(names, spec):
    assert partition_spec(names) == spec


def test_a_name_that_the_table_lacks_is_an_error():
    with pytest.raises(
        UserError, match="logical axis 'hedas' is not in the rules table; use one of batch, length"
    ):
        partition_spec(("embed", "hedas"))


@pytest.mark.parametrize("names", [("mlp", "vocab"), ("batch", "embed"), ("embed", "embed")])
def test_two_dimensions_cannot_claim_one_mesh_axis(names):
    with pytest.raises(UserError, match="both map to mesh axis"):
        partition_spec(names)


def test_an_array_is_cut_as_its_dimensions_are_named():
    layout = Layout(make_mesh(mesh_section(data=2, fsdp=2, seq=2)))
    x = jax.device_put(jnp.zeros((8, 6, 5)), layout.sharding("batch", "length", None))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3, 5)}
    assert [layout.axis_size(axis) for axis in AXES] == [2, 2, 2, 1]


def test_constraining_tells_the_compiler_and_changes_no_value():
    layout = Layout(make_mesh(mesh_section(data=2, fsdp=2, seq=2)))
    x = jnp.arange(48.0).reshape(8, 6)
    constrain = jax.jit(lambda x: layout.constrain(x, "batch", "length") + 0)
    assert "sdy.sharding_constraint" in constrain.lower(x).as_text()
    y = constrain(x)
    np.testing.assert_array_equal(y, x)
    assert y.sharding.is_equivalent_to(layout.sharding("batch", "length"), 2)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(make_mesh(mesh_section(), jax.devices()[:1]))], ids=["none", "one"]
)
def test_on_one_device_there_is_nothing_to_constrain(layout):
    x = jnp.ones((2, 3))
    assert layout.constrain(x, "batch", "length") is x
    assert layout.axis_size("seq") == 1


def test_axes_that_the_caller_splits_itself_are_left_out():
    mesh = make_mesh(mesh_section(data=2, fsdp=2, seq=2))
    layout = Layout(mesh, manual=("data", "fsdp"))
    assert layout.sharding("batch", "length").spec == PartitionSpec(None, "seq")
    assert [layout.axis_size(axis) for axis in AXES] == [1, 1, 2, 1]
    assert Layout(mesh, manual=("data",)).sharding("batch").spec == PartitionSpec("fsdp")

    def constrain(x):
        assert x.shape == (2, 6)  # one part
        return layout.constrain(x, "batch", "length") + 0

    split = jax.jit(jax.shard_map(
        constrain, mesh=mesh, in_specs=PartitionSpec(("data", "fsdp")), out_specs=PartitionSpec(("data", "fsdp")),
        axis_names={"data", "fsdp"}, check_vma=False,
    ))  # fmt: skip
    x = jnp.arange(48.0).reshape(8, 6)
    assert "sdy.sharding_constraint" in split.lower(x).as_text()
    np.testing.assert_array_equal(split(x), x)


def test_where_all_axes_are_split_by_the_caller_there_is_nothing_to_constrain():
    layout = Layout(make_mesh(mesh_section(data=4, fsdp=2)), manual=("data", "fsdp"))
    x = jnp.ones((2, 3))
    assert layout.constrain(x, "batch", "length") is x


@pytest.mark.parametrize("spec, axes, left", [
    (PartitionSpec(("data", "fsdp"), "seq"), ("data",), PartitionSpec("fsdp", "seq")),
    (PartitionSpec(("data", "fsdp"), None), ("data", "fsdp"), PartitionSpec(None, None)),
    (PartitionSpec("tensor", "fsdp"), ("data", "fsdp"), PartitionSpec("tensor", None)),
    (PartitionSpec(("data", "fsdp", "seq")), ("fsdp",), PartitionSpec(("data", "seq"))),
])  # fmt: skip
def test_axes_are_taken_out_of_a_spec(spec, axes, left):
    assert without_axes(spec, axes) == left


def test_the_names_must_be_as_many_as_the_dimensions():
    layout = Layout(make_mesh(mesh_section()))
    with pytest.raises(ValueError, match="2 axis names"):
        layout.constrain(jnp.ones((8, 2, 2)), "batch", "length")


def test_layouts_of_equal_meshes_are_one_key():
    assert (
        len({Layout(make_mesh(mesh_section(fsdp=2))), Layout(make_mesh(mesh_section(fsdp=2))), Layout()}) == 2
    )
