"""The devices' half of a run: mesh, model, optimizer, state and compiled steps, made from a config.

`build/corpus.py` makes the host's half. The two halves share only the vocabulary size and the fields of `Batch`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from llmjax.build.model import (
    batch_shards,
    choose_model_kernel,
    has_reference,
    make_model,
    make_model_tuning,
    make_task_loss,
)
from llmjax.build.placement import Placement
from llmjax.config.resolve import Derived
from llmjax.config.schema import Config
from llmjax.data.pipeline import FIELDS_OF_COLUMN
from llmjax.data.tokenizer.vocabulary import Vocabulary
from llmjax.errors import UserError, choose
from llmjax.evaluate.scoring import make_token_losses
from llmjax.models.contract import Cost, Model
from llmjax.ops.seeds import make_key
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout, is_axes, partition_spec
from llmjax.tasks.contract import ReadsPairs, Task
from llmjax.tasks.table import TASKS
from llmjax.train.optim.layer_decay import deepest
from llmjax.train.optim.offload import HOST
from llmjax.train.optim.optimizer import make_optimizer
from llmjax.train.optim.param_roles import Roles
from llmjax.train.steering.batch_schedule import BatchArithmetic
from llmjax.train.steering.steering import Steering
from llmjax.train.tuning.tuning import Tuning
from llmjax.train.update.accumulate import UpdateInputs
from llmjax.train.update.engine import Engine, EngineOptions
from llmjax.train.update.engines import ENGINES
from llmjax.train.update.state import (
    TrainState,
    abstract_state,
    init_state,
    resumed_state,
    saved_state,
    state_around,
)
from llmjax.train.update.statistics import make_statistics
from llmjax.train.update.step import make_eval_step
from llmjax.types import Batch, LossSums, Params


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the devices: the model on its mesh, the shape of the state, and the jitted steps.

    tuning        which parameters train
    param_specs   how the parameters that train lie on the mesh
    params_shape  shapes, dtypes and shardings of the parameters of the model
    join          jitted `Tuning.join`
    """

    config: Config
    derived: Derived
    mesh: Mesh
    model: Model
    engine: Engine
    steering: Steering
    tuning: Tuning
    param_specs: Params
    params_shape: Params
    join: Callable[[Params, Params], Params]
    # Shapes, dtypes and shardings of the state.
    state_shape: TrainState
    # Called as a `step.TrainStep`; donates the state.
    train_step: jax.stages.Wrapped
    eval_step: Callable[[Params, Batch], LossSums]
    statistics: Callable[[Params, Batch], dict]
    token_losses: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    vocabulary: Callable[[], Vocabulary] | None

    @property
    def layout(self) -> Layout:
        return Layout(self.mesh)

    def init(self, params: Params | None = None) -> TrainState:
        """A new state, each array made in shards on the mesh. `params`, if given, are those of the model instead of
        random ones, and donated."""
        rng = make_key(self.config.seed)
        if params is not None:
            return state_around(params, self.engine, rng, self.param_specs, self.mesh, self.tuning)
        return init_state(self.model.init, self.engine, rng, self.state_shape, self.tuning)

    def changed(self, config: Config, derived: Derived) -> Program:
        """The program of another config, for the same tokenizer and devices."""
        devices = list(self.mesh.devices.flat)
        return make_program(config, derived, self.model.vocab_size, devices, vocabulary=self.vocabulary)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return self.state_shape

    def abstract_saved(self) -> TrainState:
        """Shapes, dtypes and shardings of the state as a checkpoint holds it."""
        own = Engine(self.engine.optimizer)
        state = abstract_state(self.model.init, own, self.param_specs, self.mesh, self.tuning)
        return dataclasses.replace(state, frozen={})

    def saved(self, state: TrainState) -> TrainState:
        """The state as a checkpoint holds it."""
        return saved_state(state, self.engine)

    def resumed(self, saved: TrainState, frozen: Params) -> TrainState:
        """The state to train on from, made of the state that a checkpoint holds and of the frozen parameters."""
        saved = dataclasses.replace(saved, frozen=frozen)
        return resumed_state(saved, self.engine, self.param_specs, self.mesh, self.tuning.frozen_specs)

    def eval_params(self, state: TrainState) -> Params:
        """The parameters of the model to evaluate and generate with."""
        return self.whole(self.engine.eval_params(state.opt_state, state.params), state.frozen)

    def whole(self, trained: Params, frozen: Params) -> Params:
        """The parameters of the model, made of those that train and the frozen ones."""
        return self.join(trained, frozen) if self.tuning.is_partial else trained

    @property
    def task(self) -> Task:
        """What the model is trained for."""
        return TASKS[self.config.task.name]

    @property
    def averages(self) -> bool:
        """Whether evaluation uses other parameters than training, such as an average of them."""
        return self.engine.optimizer.averages

    @property
    def placement(self) -> Placement:
        """How batches reach the devices."""
        columns = ("columns",) if self.derived.row_layout.moves else ()
        streams = (name for column in self.derived.examples.columns for name in FIELDS_OF_COLUMN[column])
        return Placement(
            self.layout,
            self.batch,
            self.derived.row_layout,
            self.engine.lead,
            self.config.data.prefetch,
            (*columns, *streams),
            self.derived.source_len,
        )

    @property
    def batch(self) -> BatchArithmetic:
        """How updates are cut into micro-steps, and micro-steps into sequences."""
        return self.derived.batch

    @property
    def attention(self) -> dict[str, tuple[str, str]]:
        """What was chosen, and why: the attention kernel, and the algorithm over `mesh.seq`."""
        sharing = self.derived.sharing
        kernel = choose_model_kernel(self.config, self.mesh.devices.flat[0].platform)
        described = "" if sharing is None else sharing.describe()
        return {"kernel": kernel, "mesh.seq": (described, self.derived.sharing_reason)}

    def cost(self, attended: float) -> Cost:
        """The cost of a micro-step, where a token attends to `attended` keys on average."""
        mesh, batch = self.mesh.shape, self.batch
        tokens = batch.micro_batch_size * batch.seq_len / (mesh["data"] * mesh["fsdp"] * mesh["seq"])
        cost = self.model.cost(attended, tokens, batch.seq_len)
        if not isinstance(self.task, ReadsPairs):
            return cost
        # The second text of a pair is read as the first. A forward pass, which is all that the reference takes, costs a
        # third of a step.
        texts = 1 + self.derived.source_len / batch.seq_len
        passes = texts * (4 / 3 if has_reference(self.config) else 1)
        return Cost(passes * cost.flops_per_token, round(texts * cost.activation_bytes))

    def abstract_inputs(self) -> UpdateInputs:
        """Shapes and dtypes of the `UpdateInputs` that the host decides."""
        inputs = self.steering.decide(self.steering.start(), 0).inputs
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), inputs)

    def lower(self) -> jax.stages.Lowered:
        """`train_step`, traced from shapes alone and ready to compile."""
        return self.train_step.lower(
            self.abstract_state(), self.placement.abstract_batch(), self.abstract_inputs()
        )

    def probe_shape(self, length: int) -> tuple[int, int]:
        """(rows, positions) of a batch for probe texts of `length` tokens.

        It is the shape of an evaluation batch. Texts longer than seq_len get longer and fewer rows, which hold about as
        many tokens.
        """
        T, shards = self.batch.seq_len, batch_shards(self.layout)[0]
        rows, longer = self.config.evaluate.batch_size or self.batch.micro_batch_size, -(-length // T)
        return max(rows // longer // shards, 1) * shards, longer * T


def make_program(
    config: Config,
    derived: Derived,
    vocab_size: int,
    devices: Sequence[jax.Device] | None = None,
    *,
    accumulates: bool = False,
    vocabulary: Callable[[], Vocabulary] | None = None,
) -> Program:
    """The program of a checked `config` on `devices` (default: all). Nothing is compiled or allocated yet.

    vocabulary   gives the ids of the tokenizer, to tasks that replace tokens
    accumulates  the state must be able to hold a partial update, even if no update of `config` has more than one
                 micro-step: a run may resume in the middle of an update of an earlier config
    """
    mesh = make_mesh(config.mesh, devices)
    if vocab_size % mesh.shape["tensor"]:
        raise UserError(
            f"the tokenizer's {vocab_size} ids are not divisible by mesh.tensor={mesh.shape['tensor']}; "
            "change mesh.tensor"
        )
    _check_host_memory(config, mesh)
    model = make_model(config, derived, vocab_size, Layout(mesh))
    tuning = make_model_tuning(config, model)
    params, axes = _params_shape(model, mesh), tuning.trained_axes
    roles = Roles(axes)
    engine = _make_engine(config, tuning, params)
    steering = make_steering(config, derived, mesh, engine)
    engine = dataclasses.replace(engine, max_steps=max(steering.max_steps, 1 + accumulates))
    loss = make_task_loss(config, model, model.layout, vocabulary, training=True)
    held_out_loss = make_task_loss(config, model, model.layout, vocabulary, training=False)
    token_losses = make_token_losses(
        model, shards=batch_shards(model.layout), vocab_shards=model.layout.axis_size("tensor")
    )
    param_specs = jax.tree.map(partition_spec, axes, is_leaf=is_axes)
    state = abstract_state(model.init, engine, param_specs, mesh, tuning)
    # Where each device keeps gradients of its own, it computes with a model that sees only its own sequences.
    local = make_model(config, derived, vocab_size, Layout(mesh, engine.manual)) if engine.manual else model
    local_loss = (
        make_task_loss(config, local, local.layout, vocabulary, training=True) if engine.manual else loss
    )
    step = engine.make_step(local_loss, mesh, param_specs, roles, tuning)
    return Program(
        config=config,
        derived=derived,
        mesh=mesh,
        model=model,
        engine=engine,
        steering=steering,
        tuning=tuning,
        param_specs=param_specs,
        params_shape=params,
        join=jax.jit(tuning.join, out_shardings=jax.tree.map(lambda x: x.sharding, params)),
        state_shape=state,
        # The state is donated, so that old and new state are never both in memory. Its shardings are fixed, because the
        # compiler would choose others and compile again for the next call.
        train_step=jax.jit(
            step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None)
        ),
        # Sums are complete on every device, also those that are arrays.
        eval_step=jax.jit(make_eval_step(held_out_loss), out_shardings=Layout(mesh).sharding()),
        statistics=jax.jit(make_statistics(model.activations, loss, Roles(tuning.axes))),
        token_losses=jax.jit(token_losses, out_shardings=Layout(mesh).sharding(None, None)),
        vocabulary=vocabulary,
    )


def _make_engine(config: Config, tuning: Tuning, params: Params) -> Engine:
    """The config's engine, with its optimizer; `params` are the shapes of the model's parameters."""
    make_engine = choose(ENGINES, "compute.engine", config.compute.engine)
    optimizer = make_optimizer(
        config.optimizer,
        config.optimizers,
        config.train.num_updates,
        Roles(tuning.trained_axes),
        offload=config.compute.offload_optimizer,
        num_layers=deepest(Roles(tuning.axes), params),
    )
    # What adapters are added to is rounded after the addition, by the model itself.
    compute_dtype = "float32" if tuning.adapters else config.model.dtype
    return make_engine(optimizer, options=EngineOptions(config.compute.gather, compute_dtype))


def _params_shape(model: Model, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the parameters of a model."""
    shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    specs = jax.tree.map(partition_spec, model.axes(), is_leaf=is_axes)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs,
    )


def _check_host_memory(config: Config, mesh: Mesh) -> None:
    """Raises UserError where arrays are to be offloaded and the devices have no access to memory of their host."""
    device = mesh.devices.flat[0]
    compute = config.compute
    asked = {"compute.offload_optimizer": compute.offload_optimizer, "compute.offload": compute.offload}
    for key in (key for key, is_on in asked.items() if is_on):
        if HOST not in {memory.kind for memory in device.addressable_memories()}:
            raise UserError(
                f"{key} needs memory of the kind {HOST!r}, which {device.platform.upper()} devices do not have here; "
                f"turn {key} off"
            )


def make_steering(config: Config, derived: Derived, mesh: Mesh, engine: Engine) -> Steering:
    """The rules that decide the size, the hyperparameters and the limits of each update."""
    tokens_per_update = derived.batch.tokens_per_update
    return Steering(
        schedule=derived.batch_schedule,
        lengths=derived.length_schedule,
        optimizer=engine.optimizer,
        controller=config.controller,
        stability=config.stability,
        tokens_per_update=tokens_per_update,
        num_tokens=config.train.num_updates * tokens_per_update,
        parts_per_micro_step=math.prod(mesh.shape[axis] for axis in engine.manual),
    )
