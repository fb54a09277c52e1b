"""Adapters of a run from and to folders of the library `peft`, by the name tables of `convert`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from llmjax.build.model import has_reference, make_model, make_model_tuning
from llmjax.build.program import Program
from llmjax.config.imported import settings_of
from llmjax.config.resolve import Derived
from llmjax.config.schema import Config
from llmjax.convert import peft_folder
from llmjax.convert.config_keys import choose_architecture
from llmjax.errors import UserError
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout
from llmjax.terminal.lines import warn
from llmjax.train.trees import Path, flatten, nest
from llmjax.train.tuning.lora import A, B
from llmjax.train.tuning.tuning import Tuning
from llmjax.train.update.state import TrainState
from llmjax.types import Params
from llmjax.workdir import standing


def check_tuning(
    config: Config, derived: Derived, devices: Sequence[jax.Device], workdir: pathlib.Path
) -> None:
    """UserError for mistakes in `lora` and train.frozen, before any text is read.

    They may name parameters that the config's model lacks, or adapters that do not fit. A run that has begun in
    `workdir` has adapters of its own, and those in lora.init_from are not looked at.
    """
    if not (config.lora.rank or config.train.frozen):
        return
    mesh = make_mesh(config.mesh, devices)
    # No name depends on the vocabulary, which is not known yet.
    model = make_model(config, derived, mesh.shape["tensor"], Layout(mesh))
    tuning = make_model_tuning(config, model)
    if config.lora.init_from and has_reference(config):
        raise UserError(
            f"lora.init_from={config.lora.init_from!r} changes the model that task.name={config.task.name!r} compares "
            "with; begin with a model that has these adapters added (checkpoint.init_from), or set preference.loss to "
            "simpo or orpo"
        )
    if config.lora.init_from and not standing.has_begun(workdir):
        architecture, folder = choose_architecture(settings_of(config)), pathlib.Path(config.lora.init_from)
        peft_folder.check_adapters(folder, _settings(config), "lora.init_from")
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        peft_folder.check_tensors(folder, architecture, shapes, _sides(tuning))
        for remark in peft_folder.remarks(folder):
            warn(f"note: {remark}")


def with_adapters(program: Program, state: TrainState) -> TrainState:
    """A new state, whose adapters are those in lora.init_from."""
    config, sides = program.config, _sides(program.tuning)
    architecture = choose_architecture(settings_of(config))
    folder = pathlib.Path(config.lora.init_from)
    peft_folder.check_adapters(folder, _settings(config), "lora.init_from")
    found = peft_folder.read_adapters(folder, architecture, program.params_shape, sides, _settings(config))
    params = flatten(state.params)
    for path, (a, b) in found.items():
        for name, array in ((A, a), (B, b)):
            place: Path = (*path.split("/"), name)
            params[place] = _laid_out(array, params[place].sharding)
    trained = nest(params)
    shardings = jax.tree.map(lambda x: x.sharding, program.state_shape.opt_state)
    opt_state = jax.jit(program.engine.init, out_shardings=shardings)(trained)
    return dataclasses.replace(state, params=trained, opt_state=opt_state)


def _laid_out(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """`array`, which every process has read whole, as shards of which each process keeps its own."""
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.ascontiguousarray(array[index])
    )


def save_adapters(program: Program, trained: Params, folder: pathlib.Path, base: str) -> None:
    """Writes the adapters of `trained` into an empty folder, for a model that `transformers` has.

    base  the folder of transformers that the run began with, if it did
    """
    config, tuning = program.config, program.tuning
    if not tuning.adapters:
        raise UserError(
            "lora.rank=0 has no adapters to convert; convert the run --to hf, or give one with adapters"
        )
    arrays = flatten(jax.device_get(trained))
    pairs = {"/".join(path): (arrays[*path, A], arrays[*path, B]) for path in tuning.adapters}
    architecture = choose_architecture(settings_of(config))
    shapes, lora = program.params_shape, _settings(config)
    peft_folder.write_adapters(folder, architecture, shapes, _sides(tuning), pairs, lora, base)


def _settings(config: Config) -> peft_folder.Settings:
    return peft_folder.Settings(config.lora.rank, config.lora.alpha, config.lora.rslora)


def _sides(tuning: Tuning) -> dict[str, peft_folder.Side]:
    """The sides of all adapted matrices, by their paths."""
    roles = {"/".join(path): adapter.role for path, adapter in tuning.adapters.items()}
    return {path: peft_folder.side_of(path, role.inputs, role.outputs) for path, role in roles.items()}
