"""The training state: what it holds, how it lies on the mesh, and how it is made, saved and resumed.

Parameters are sharded by their logical axes. An array of the optimizer state that mirrors a parameter is sharded like
the parameter (the partitioning of ZeRO, Rajbhandari et al. 2020). Everything else is replicated over the mesh, never
local to a host, so that a checkpoint restores onto any mesh.
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
from llmjax.train.tuning.tuning import WHOLE, Tuning
from llmjax.types import Array, Params

# rng -> a nested dict of arrays.
InitParams = Callable[[Array], Params]
# A nested dict like the parameters, of PartitionSpecs.
Specs = Any


class StateKeeper(Protocol):
    """The part of an `Engine` that makes and reads the state."""

    @property
    def optimizer(self) -> Optimizer: ...

    def init(self, params: Params) -> OptState: ...

    def restore(self, opt_state: OptState, params: Params, update: Array) -> OptState: ...

    def canonical(self, state: OptState) -> OptState: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, except the data cursor.

    params     nested dict of float32 arrays: the parameters that train
    opt_state  the engine's state: the optimizer's own, with the sums so far where an update takes several calls
    update     int32 [], updates done
    rng        random key [], which never changes: an update draws from fold_in(rng, update)
    frozen     nested dict of float32 arrays that no update changes, see `tuning/tuning.py`; no checkpoint holds them
    """

    params: Params
    opt_state: OptState
    update: Array
    rng: Array
    frozen: Params = dataclasses.field(default_factory=dict)


def init_state(
    init_params: InitParams, engine: StateKeeper, rng: Array, abstract: TrainState, tuning: Tuning = WHOLE
) -> TrainState:
    """A new state, made under jit with each array sharded from the start, so that none is ever whole on one device.

    `init_params(rng)` gives unboxed parameters, and `abstract` is what `abstract_state` says of the state. The numbers
    do not depend on the mesh.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    (device, *_) = shardings.update.mesh.devices.flat
    # Drawing random numbers is much code that runs once: on the CPU, LLVM compiles it five times faster unoptimised.
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    create = _create(init_params, engine, tuning)
    return jax.jit(create, out_shardings=shardings, compiler_options=options)(rng)


def state_around(
    params: Params, engine: StateKeeper, rng: Array, param_specs: Specs, mesh: Mesh, tuning: Tuning = WHOLE
) -> TrainState:
    """A new state as `init_state` makes it from `rng`, but with the given parameters, which are donated."""
    create = _begin(engine, tuning)
    shapes, offload = jax.eval_shape(create, params, rng), engine.optimizer.offload
    shardings = state_shardings(shapes, param_specs, mesh, offload=offload, frozen_specs=tuning.frozen_specs)
    # Stacks of which some layers are frozen come out in two parts, which cannot take the place of the whole.
    donated = () if tuning.cuts else 0
    return jax.jit(create, donate_argnums=donated, out_shardings=shardings)(params, rng)


def abstract_state(
    init_params: InitParams, engine: StateKeeper, param_specs: Specs, mesh: Mesh, tuning: Tuning = WHOLE
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings, from which a step can be compiled or a checkpoint restored."""
    # Only the shape of a key is needed: a real one would be computed, for which jax compiles a program.
    state = jax.eval_shape(_create(init_params, engine, tuning), jax.eval_shape(jax.random.key, 0))
    offload, frozen_specs = engine.optimizer.offload, tuning.frozen_specs
    shardings = state_shardings(state, param_specs, mesh, offload=offload, frozen_specs=frozen_specs)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def state_shardings(
    state: TrainState,
    param_specs: Specs,
    mesh: Mesh,
    *,
    offload: bool = False,
    frozen_specs: Specs | None = None,
) -> TrainState:
    """A tree of NamedSharding like `state` (arrays or ShapeDtypeStructs), from the specs of its parameters.

    A leaf of the optimizer state belongs to the parameter whose path is the end of the leaf's path. It is split like
    the parameter along dimensions of the same length. Dimensions of length 1, which the rows and columns of Adafactor
    have, are not split. A leaf of another rank or with other lengths is replicated.

    offload  the optimizer's own leaves lie in the memory of the hosts; the sums of a partial update do not, because
             every micro-step adds to them
    frozen_specs  the specs of the frozen parameters, if there are any
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
        frozen=frozen_specs or {},
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
    """The state as a checkpoint between two updates holds it. It does not depend on how batches are cut."""
    return dataclasses.replace(state, opt_state=engine.canonical(state.opt_state), frozen={})


def resumed_state(
    saved: TrainState, engine: StateKeeper, param_specs: Specs, mesh: Mesh, frozen_specs: Specs | None = None
) -> TrainState:
    """The state to train on from, made of a `saved_state`, for any engine and any number of micro-steps."""

    def resume(saved: TrainState) -> TrainState:
        return dataclasses.replace(
            saved, opt_state=engine.restore(saved.opt_state, saved.params, saved.update)
        )

    shapes, offload = jax.eval_shape(resume, saved), engine.optimizer.offload
    shardings = state_shardings(shapes, param_specs, mesh, offload=offload, frozen_specs=frozen_specs)
    return jax.jit(resume, out_shardings=shardings)(saved)


def _create(init_params: InitParams, engine: StateKeeper, tuning: Tuning) -> Callable[[Array], TrainState]:
    def create(rng: Array) -> TrainState:
        return _begin(engine, tuning)(init_params(jax.random.split(rng)[0]), rng)

    return create


def _begin(engine: StateKeeper, tuning: Tuning) -> Callable[[Params, Array], TrainState]:
    """(parameters, random key of the run) -> a new state."""

    def begin(params: Params, rng: Array) -> TrainState:
        init_rng, train_rng = jax.random.split(rng)
        trained, frozen = tuning.split(params, init_rng)
        return TrainState(trained, engine.init(trained), jnp.zeros([], jnp.int32), train_rng, frozen)

    return begin


def _matching_spec(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    if len(shape) != len(param_shape) or any(a not in (1, b) for a, b in zip(shape, param_shape)):
        return PartitionSpec()
    axes = (*spec, *(None,) * (len(param_shape) - len(spec)))
    kept = [axis if a == b else None for a, b, axis in zip(shape, param_shape, axes)]
    return spec if shape == param_shape else PartitionSpec(*kept)
