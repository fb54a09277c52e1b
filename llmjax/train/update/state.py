"""The training state, initialised under jit with every array born in its place on the mesh.

Parameters follow their logical axes; whatever in the optimizer state mirrors a parameter is sharded like it
(the partitioning of ZeRO, Rajbhandari et al. 2020); all else is replicated over the mesh, never host-local,
so that a checkpoint restores onto any mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.train.optim.offload import is_offloaded, on_host
from llmjax.train.optim.optimizer import Optimizer, OptState
from llmjax.types import Array, Params

InitParams = Callable[[Array], Params]  # rng -> a nested dict of arrays
Specs = Any  # the same nested dict, of PartitionSpec


class StateKeeper(Protocol):
    """What the state asks of an `Engine`."""

    @property
    def optimizer(self) -> Optimizer: ...

    def init(self, params: Params) -> OptState: ...

    def restore(self, opt_state: OptState, params: Params, update: Array) -> OptState: ...

    def canonical(self, state: OptState) -> OptState: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, but for the data cursor.

    params     nested dict of float32 arrays
    opt_state  of the engine: the optimizer's own, and within an update the sums so far
    update     int32 [], updates done
    rng        typed random key [], never changes; an update draws from fold_in(rng, update)
    """

    params: Params
    opt_state: OptState
    update: Array
    rng: Array


def init_state(
    init_params: InitParams, engine: StateKeeper, rng: Array, param_specs: Specs, mesh: Mesh
) -> TrainState:
    """A new state, initialised in shards: no parameter and no moment is ever whole on one device.

    `init_params(rng)` gives unboxed parameters, `param_specs` has their structure. The numbers do not depend
    on the mesh.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(init_params, engine, param_specs, mesh))
    # Drawing random numbers is much code for one run: on the CPU, LLVM takes five times longer to optimise it than not.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(_create(init_params, engine), out_shardings=shardings, compiler_options=options)(rng)


def state_around(
    params: Params, engine: StateKeeper, rng: Array, param_specs: Specs, mesh: Mesh
) -> TrainState:
    """The new state that `init_state` gives for the same `rng`, but with these parameters, which are donated."""

    def create(params: Params, rng: Array) -> TrainState:
        return _begin(params, engine, jax.random.split(rng)[1])

    shapes, offload = jax.eval_shape(create, params, rng), engine.optimizer.offload
    shardings = state_shardings(shapes, param_specs, mesh, offload=offload)
    return jax.jit(create, donate_argnums=0, out_shardings=shardings)(params, rng)


def abstract_state(
    init_params: InitParams, engine: StateKeeper, param_specs: Specs, mesh: Mesh
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: enough to compile a step or restore a checkpoint."""
    state = jax.eval_shape(_create(init_params, engine), jax.random.key(0))
    shardings = state_shardings(state, param_specs, mesh, offload=engine.optimizer.offload)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def state_shardings(
    state: TrainState, param_specs: Specs, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """A tree of NamedSharding like `state` (arrays or ShapeDtypeStructs), from the specs of its parameters.

    An optimizer leaf belongs to the parameter whose path ends its own. Along every dimension of the same length it
    is split like the parameter; dimensions of length 1, which Adafactor's rows and columns have, are not split. A
    leaf of another rank or with other lengths is replicated. `offload`: the optimizer's own leaves lie in the memory
    of the hosts; sums under way do not.
    """
    flat_specs = jax.tree.leaves(param_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    flat_params = jax.tree_util.tree_leaves_with_path(state.params)
    by_path = {path: (param.shape, spec) for (path, param), spec in zip(flat_params, flat_specs, strict=True)}

    def spec_of(path: tuple[Any, ...], leaf: Array) -> PartitionSpec:
        owner = next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), None)
        return PartitionSpec() if owner is None else _matching_spec(leaf.shape, *owner)

    specs = dataclasses.replace(
        jax.tree.map(lambda _: PartitionSpec(), state),
        params=param_specs,
        opt_state=jax.tree_util.tree_map_with_path(spec_of, state.opt_state),
    )
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    if not offload:
        return shardings

    def placed(path: tuple[Any, ...], sharding: NamedSharding, leaf: Array) -> NamedSharding:
        is_sum = any(getattr(key, "name", "") == "acc_grads" for key in path)
        return on_host(sharding) if is_offloaded(leaf) and not is_sum else sharding

    own = jax.tree_util.tree_map_with_path(placed, shardings.opt_state, state.opt_state)
    return dataclasses.replace(shardings, opt_state=own)


def saved_state(state: TrainState, engine: StateKeeper) -> TrainState:
    """What a checkpoint holds, between two updates: it does not depend on how batches are cut."""
    return dataclasses.replace(state, opt_state=engine.canonical(state.opt_state))


def resumed_state(saved: TrainState, engine: StateKeeper, param_specs: Specs, mesh: Mesh) -> TrainState:
    """The state to train on from, of a `saved_state` with the same or another number of micro-steps."""

    def resume(saved: TrainState) -> TrainState:
        return dataclasses.replace(
            saved, opt_state=engine.restore(saved.opt_state, saved.params, saved.update)
        )

    shapes, offload = jax.eval_shape(resume, saved), engine.optimizer.offload
    shardings = state_shardings(shapes, param_specs, mesh, offload=offload)
    return jax.jit(resume, out_shardings=shardings)(saved)


def _create(init_params: InitParams, engine: StateKeeper) -> Callable[[Array], TrainState]:
    def create(rng: Array) -> TrainState:
        init_rng, train_rng = jax.random.split(rng)
        return _begin(init_params(init_rng), engine, train_rng)

    return create


def _begin(params: Params, engine: StateKeeper, rng: Array) -> TrainState:
    return TrainState(params, engine.init(params), jnp.zeros([], jnp.int32), rng)


def _matching_spec(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    if len(shape) != len(param_shape) or any(a not in (1, b) for a, b in zip(shape, param_shape)):
        return PartitionSpec()
    axes = (*spec, *(None,) * (len(param_shape) - len(spec)))
    kept = [axis if a == b else None for a, b, axis in zip(shape, param_shape, axes)]
    return spec if shape == param_shape else PartitionSpec(*kept)
