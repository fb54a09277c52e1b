"""The state is born sharded, with the numbers of one device, and survives another cut of its batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from param_axes import BY_NAME
from sections import mesh_section, optimizer_of, optimizer_section

from llmjax.parallel.mesh import make_mesh
from llmjax.train.optim.optimizers.table import OPTIMIZERS
from llmjax.train.update.accumulate import UpdateInputs
from llmjax.train.update.in_place import InPlace
from llmjax.train.update.state import (
    TrainState,
    abstract_state,
    init_state,
    resumed_state,
    saved_state,
    state_shardings,
)
from llmjax.train.update.step import make_train_step
from llmjax.types import LossSums

NAMES = OPTIMIZERS
SPECS = {
    "embedding_VD": P("tensor", "fsdp"),
    "layers": {
        "wq_DNH": P(None, "fsdp", "tensor", None),
        "w_up_DF": P(None, "fsdp", "tensor"),
        "norm": {"scale": P()},
    },
    "scale": P(),
}


def init_params(rng):
    a, b, c = jax.random.split(rng, 3)
    return {
        "embedding_VD": jax.random.normal(a, (10, 16)),
        "layers": {
            "wq_DNH": jax.random.normal(b, (3, 16, 2, 4)),
            "w_up_DF": jax.random.normal(c, (3, 128, 136)),
            "norm": {"scale": jnp.ones((3, 16))},
        },
        "scale": jnp.ones(16),
    }


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(mesh_section(data=data, fsdp=fsdp, tensor=tensor), devices)


def engine_of(name, k=2):
    return InPlace(
        optimizer_of(optimizer_section(name, schedule="constant", warmup_updates=0), 8, BY_NAME), k
    )


def loss_fn(params, batch, rng):
    """A quadratic around each sequence's number."""
    distance = sum(jnp.sum((x - 0.1) ** 2 * (1.0 + 0.01 * jnp.cos(x))) for x in jax.tree.leaves(params))
    return LossSums(jnp.sum(batch) * distance, jnp.sum(batch), {})


def run(state, engine, mesh, batches):
    shardings = state_shardings(state, SPECS, mesh)
    step = jax.jit(
        make_train_step(loss_fn, engine.micro_step), donate_argnums=0, out_shardings=(shardings, None)
    )
    hyper = jax.tree.map(np.float32, engine.optimizer.hyperparameters(0.0, 1.0))
    inputs = UpdateInputs(np.int32(engine.max_steps), hyper, np.float32(np.inf), np.float32(np.inf))
    for batch in batches:
        batch = jax.device_put(jnp.asarray(batch), NamedSharding(mesh, P(("data", "fsdp"))))
        state, _ = step(state, batch, inputs)
    return state


def numbers(state):
    return jax.tree.map(np.asarray, dataclasses.replace(state, rng=jax.random.key_data(state.rng)))


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_hold_the_numbers_of_one_each_its_own_shards(name):
    engine, mesh, single = engine_of(name), mesh_of(2, 2, 2), mesh_of(1, 1, 1)

    def make(mesh):
        abstract = abstract_state(init_params, engine, SPECS, mesh)
        return init_state(init_params, engine, jax.random.key(3), abstract)

    one, eight = make(single), make(mesh)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, numbers(one), numbers(eight))

    by_shape = {
        (10, 16): P("tensor", "fsdp"),
        (3, 16, 2, 4): P(None, "fsdp", "tensor", None),
        (3, 128, 136): P(None, "fsdp", "tensor"),
        (3, 128, 1): P(None, "fsdp", None),  # Adafactor's rows
        (3, 1, 136): P(None, None, "tensor"),  # and columns
        (3, 16, 1, 1): P(None, "fsdp", None, None),
        (3, 1, 2, 4): P(None, None, "tensor", None),
        (10, 1): P("tensor", None),
        (1, 16): P(None, "fsdp"),
    }
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(eight):
        spec = by_shape.get(leaf.shape, P())
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (path, leaf.sharding)
        assert len(leaf.sharding.device_set) == 8, path
        seen.add(leaf.shape)
    factors = {shape for shape in by_shape if 1 in shape}
    assert set(by_shape) - seen == (set() if name == "adafactor" else factors)
    assert eight.params["embedding_VD"].addressable_shards[0].data.shape == (5, 8)

    batches = np.ones((4, 8), np.float32)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        close,
        numbers(run(one, engine, single, batches)),
        numbers(run(eight, engine, mesh, batches)),
    )


def test_initialisation_holds_nothing_whole_on_one_device():
    shapes = {"w_up_DF": (1024, 1024)}
    mesh, engine = mesh_of(1, 8, 1), engine_of("adamw", k=2)
    init = lambda rng: {name: jax.random.normal(rng, shape) for name, shape in shapes.items()}  # noqa: E731
    abstract = abstract_state(init, engine, {"w_up_DF": P("fsdp")}, mesh)
    program = jax.jit(
        lambda rng: TrainState(
            params := init(rng), engine.init(params), jnp.zeros([], jnp.int32), jax.random.key(0)
        ),
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    )
    memory = program.lower(jax.random.key(0)).compile().memory_analysis()
    whole = 4 * 1024 * 1024
    assert memory.output_size_in_bytes < 1.01 * 4 * whole / 8  # parameters, two moments, sums
    assert memory.temp_size_in_bytes < whole / 2


def test_the_abstract_state_is_that_of_the_initialised_one():
    engine, mesh = engine_of("adamw"), mesh_of(2, 2, 2)
    abstract = abstract_state(init_params, engine, SPECS, mesh)
    state = init_state(init_params, engine, jax.random.key(0), abstract)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(state)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, b.ndim)


def test_a_leaf_belongs_to_the_longest_parameter_path_that_ends_its_own():
    """`scale` at the top and `layers/norm/scale` share an ending."""
    mesh, engine = mesh_of(1, 2, 1), engine_of("adamw")
    specs = {"norm": {"scale": P("fsdp")}, "scale": P()}
    init = lambda rng: {"norm": {"scale": jnp.ones(4)}, "scale": jnp.ones(4)}  # noqa: E731
    state = abstract_state(init, engine, specs, mesh)
    sums = state.opt_state.multi.acc_grads["terms"]["loss"].grads
    assert sums["norm"]["scale"].sharding.spec == P("fsdp") and sums["scale"].sharding.spec == P()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_four_micro_steps_resumes_as_one_of_two_and_as_one_of_one(name):
    rng, mesh = np.random.default_rng(0), mesh_of(2, 1, 1)
    updates = rng.uniform(0.0, 2.0, size=(4, 16)).astype(np.float32)  # the weights of 16 sequences

    def cut(update, k):
        return list(update.reshape(k, -1))

    four = engine_of(name, 4)
    state = init_state(init_params, four, jax.random.key(1), abstract_state(init_params, four, SPECS, mesh))
    state = run(state, four, mesh, [micro for u in updates[:2] for micro in cut(u, 4)])
    saved = saved_state(state, four)
    saved = jax.tree.map(lambda x: x.copy(), saved)  # as a checkpoint would
    expected = run(state, four, mesh, [micro for u in updates[2:] for micro in cut(u, 4)])
    expected = numbers(saved_state(expected, four))
    assert expected.update == 4
    for k in (2, 1):
        other = engine_of(name, k)
        resumed = resumed_state(jax.tree.map(lambda x: x.copy(), saved), other, SPECS, mesh)
        assert k == 1 or resumed.opt_state.multi.gradient_step == 2
        resumed = run(resumed, other, mesh, [micro for u in updates[2:] for micro in cut(u, k)])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, numbers(saved_state(resumed, other)), expected)


def test_a_new_state_can_be_donated():
    """No two of its arrays may share a buffer, though schedule-free starts with a copy of the parameters."""
    engine, mesh = engine_of("schedule_free_adamw", 1), mesh_of(1, 1, 1)
    state = init_state(
        init_params, engine, jax.random.key(1), abstract_state(init_params, engine, SPECS, mesh)
    )
    run(state, engine, mesh, np.ones((1, 8), np.float32))
    assert state.params["embedding_VD"].is_deleted()
