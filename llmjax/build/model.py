"""The model of a config and the loss of its task, for a mesh."""

from __future__ import annotations

from collections.abc import Callable

import jax

from llmjax.config.resolve import Derived
from llmjax.config.schema import Config
from llmjax.data.tokenizer.vocabulary import Vocabulary
from llmjax.errors import choose
from llmjax.models.contract import Model
from llmjax.models.reference import REFERENCE, Referenced
from llmjax.models.table import FAMILIES
from llmjax.nn.attention_choice import choose_kernel
from llmjax.ops.attention.sequence_attention import make_attend
from llmjax.parallel.rules import Layout
from llmjax.tasks.contract import AddsParameters, ReadsPairs, Setting
from llmjax.tasks.table import TASKS
from llmjax.train.tuning.tuning import Tuning, make_tuning
from llmjax.types import LossSums


def make_task_loss(
    config: Config,
    model: Model,
    layout: Layout,
    vocabulary: Callable[[], Vocabulary] | None = None,
    *,
    training: bool,
) -> Callable[..., LossSums]:
    """The loss of the config's task on a model laid out by `layout`: of training, with all terms, or of evaluation.

    `vocabulary` gives the ids of the tokenizer, which some tasks need.
    """
    setting = make_setting(config, layout, vocabulary, training=training)
    return TASKS[config.task.name].make_loss(model, setting)


def make_setting(
    config: Config,
    layout: Layout,
    vocabulary: Callable[[], Vocabulary] | None = None,
    *,
    training: bool,
) -> Setting:
    """What the config's task is told, see `make_task_loss` for the arguments."""
    return Setting(
        keys=config.tasks.get(config.task.name),
        seed=config.seed,
        vocabulary=vocabulary,
        training=training,
        z_loss=config.train.z_loss if training else 0.0,
        shards=batch_shards(layout),
        vocab_shards=layout.axis_size("tensor"),
        sees_both_sides=FAMILIES[config.model.family].sees_both_sides,
    )


def batch_shards(layout: Layout) -> tuple[int, int]:
    """Over how many devices the sequences and the positions of a batch are split."""
    return layout.axis_size("data") * layout.axis_size("fsdp"), layout.axis_size("seq")


def choose_model_kernel(config: Config, platform: str) -> tuple[str, str]:
    """The attention kernel of a config on `platform`, and the reason, for the plan, see `choose_kernel`."""
    family = choose(FAMILIES, "model.family", config.model.family)
    return choose_kernel(config.compute.kernel, platform, family.position_bias(config.families))


def make_model(config: Config, derived: Derived, vocab_size: int, layout: Layout) -> Model:
    """The model of a resolved `config`, with the parameters that its task adds."""
    assert layout.mesh is not None  # a program always has one
    kernel, _ = choose_model_kernel(config, layout.mesh.devices.flat[0].platform)
    family = choose(FAMILIES, "model.family", config.model.family)
    attend = make_attend(kernel, derived.sharing)
    model = family.model(
        family.config(config.model, config.families),
        vocab_size,
        config.data.seq_len,
        layout,
        attend,
        holds_scores=kernel == "full",
        compute=config.compute,
    )
    task = TASKS[config.task.name]
    if isinstance(task, AddsParameters):
        return task.make_model(model, config.tasks[config.task.name], config.model.init_std)
    return Referenced(model) if has_reference(config) else model


def has_reference(config: Config) -> bool:
    """Whether the config's task compares the model with the one that the run began with."""
    task = TASKS[config.task.name]
    return isinstance(task, ReadsPairs) and task.has_reference(config.tasks[config.task.name])


def make_model_tuning(config: Config, model: Model) -> Tuning:
    """Which parameters of the config's model train. UserError for names in `lora` or train.frozen that it lacks."""
    shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    kept = (REFERENCE,) if has_reference(config) else ()
    return make_tuning(model.axes(), config.lora, config.train.frozen, shapes, added_entries(config), kept)


def added_entries(config: Config) -> tuple[str, ...]:
    """The entries of the tree of parameters that the task of a config adds."""
    task = TASKS[config.task.name]
    return task.added if isinstance(task, AddsParameters) else ()
