"""The plan says what a step sends, as counted in the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.plan.communication import describe_communication
from tests.plan.test_compile import make_tiny


def compiled_text(function, *shapes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for shape in shapes]
    return jax.jit(function, out_shardings=NamedSharding(mesh, P())).lower(*arguments).compile().as_text()


def test_an_all_gather_is_counted_by_what_each_of_eight_devices_sends():
    words = describe_communication(compiled_text(lambda x: x, (8000, 4)))
    assert re.match(
        r"each device sends 112 kB a call of the step: all-gather 112 kB in 1; other work runs", words
    ), words


def test_a_loop_counts_as_often_as_it_runs():
    def function(x):
        return jax.lax.fori_loop(0, 5, lambda i, total: total + jnp.sum(jnp.sin(x + total)), jnp.float32(0))

    words = describe_communication(compiled_text(function, (8000, 4)))
    assert re.search(r"all-reduce \S+ \S+ in 5;", words), words


def test_nothing_is_said_to_be_sent_where_nothing_is():
    assert (
        describe_communication(jax.jit(jnp.sin).lower(np.ones(3)).compile().as_text())
        == "each device sends nothing"
    )


def test_the_plan_of_a_mesh_tells_it_and_that_of_one_device_does_not():
    from llmjax.plan.compile import compile_step

    assert "all-reduce" in compile_step(make_tiny(mesh__data=4))["communication"]
    assert "communication" not in compile_step(make_tiny(devices=jax.devices()[:1], mesh__fsdp=1))


def test_a_program_that_is_written_in_another_way_is_one_sentence_and_no_traceback():
    text = compiled_text(lambda x: x, (8000, 4))
    broken = text.replace(" = ", " := ")
    assert describe_communication(broken).startswith("cannot be read from the program")
