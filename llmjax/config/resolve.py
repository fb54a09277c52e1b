"""Fills in the values that a config leaves to be derived, and checks every rule that concerns more than one section."""

from __future__ import annotations

import dataclasses

from llmjax.config.reading import did_you_mean
from llmjax.config.schema import Config
from llmjax.data.examples.contract import Examples, ExampleSetting, Structured
from llmjax.data.examples.table import EXAMPLES
from llmjax.data.layout.layout import RowLayout
from llmjax.data.sources.records import fields_within
from llmjax.data.tokenizer.kinds import KINDS
from llmjax.errors import UserError, choose
from llmjax.evaluate.probes.suite import PROBES
from llmjax.models.table import FAMILIES
from llmjax.models.table import check_all_read as check_family_reads
from llmjax.nn.attention_choice import choose_sharing
from llmjax.ops.attention.sequence_attention import Sharing
from llmjax.parallel.mesh import mesh_shape
from llmjax.tasks.contract import ReadsPairs
from llmjax.tasks.table import TASKS
from llmjax.tasks.table import check_all_read as check_task_reads
from llmjax.train.optim.optimizers.table import check_all_read as check_optimizer_reads
from llmjax.train.steering.batch_schedule import (
    BatchArithmetic,
    BatchSchedule,
    make_batch_schedule,
    resolve_batch,
)
from llmjax.train.steering.controller import RULES
from llmjax.train.steering.length_schedule import LengthSchedule, make_length_schedule


@dataclasses.dataclass(frozen=True)
class Derived:
    """What follows from a config and the number of devices. It is computed once, by `resolve_config`.

    batch              how updates are cut into micro-steps, and micro-steps into sequences
    batch_schedule     the tokens of each update
    length_schedule    the lengths of the rows that are trained on
    sharing            how the devices of mesh.seq share a sequence; None where every device has whole sequences
    sharing_reason     why `sharing` is what it is, in words
    row_layout         which token of a sequence lies on which device of mesh.seq
    examples           what turns records into examples of the task
    source_len         positions of the second stream in a row; 0 where the task has one stream
    """

    batch: BatchArithmetic
    batch_schedule: BatchSchedule
    length_schedule: LengthSchedule
    sharing: Sharing | None
    sharing_reason: str
    row_layout: RowLayout
    examples: Examples
    source_len: int

    def with_batch(self, config: Config, batch: BatchArithmetic) -> Derived:
        """What follows from `config` if its updates are cut into micro-steps as `batch` says."""
        schedule = make_batch_schedule(config.train.batch_schedule, config.train.batch_points, batch)
        return dataclasses.replace(self, batch=batch, batch_schedule=schedule)


def resolve_config(config: Config, num_devices: int) -> tuple[Config, Derived]:
    """`config` with the model's derived sizes filled in, and what follows from it on `num_devices` devices.

    UserError for a broken rule. All rules that concern more than one section are checked here, before anything is
    read, compiled or written.
    """
    family = choose(FAMILIES, "model.family", config.model.family)
    check_family_reads(config.model.family, config.families, config.compute)
    check_task_reads(config.task.name, config.tasks)
    _check_sight(config)
    check_optimizer_reads(config.optimizer.name, config.optimizers)
    _check_layer_decay(config)
    _check_patience(config)
    T = config.data.seq_len
    config = dataclasses.replace(config, **family.resolve(config.model, config.families, T, config.compute))
    data, fsdp, seq, tensor = mesh_shape(config.mesh, num_devices)
    if T % seq:
        raise UserError(f"data.seq_len={T} is not divisible by mesh.seq={seq}; change one of them")
    for key, size in family.split(config.families).items():
        if size % tensor:
            raise UserError(f"{key}={size} is not divisible by mesh.tensor={tensor}; change one of them")
    # The algorithm over mesh.seq decides in how many parts a sequence travels, and so how its tokens may be laid out.
    sizes = {"data": data, "fsdp": fsdp, "seq": seq, "tensor": tensor}
    heads = family.heads(config.families)
    biased = family.position_bias(config.families)
    sharing, reason = choose_sharing(heads, config.compute.kernel, config.mesh, sizes, biased)
    layout = choose_layout(config, 1 if sharing is None else sharing.chunks)
    layout.check(T)
    for key, size in {"model.model_dim": config.model.model_dim, **family.rows(config.families)}.items():
        if size % (fsdp * seq):
            raise UserError(
                f"{key}={size} is not divisible by mesh.fsdp x mesh.seq={fsdp * seq}, over which parameters are split; "
                "change one of them"
            )
    train = config.train
    batch = resolve_batch(
        train.tokens_per_update,
        T,
        config.compute.micro_batch_size,
        config.compute.accumulation_steps,
        data * fsdp,
    )
    batch_schedule = make_batch_schedule(train.batch_schedule, train.batch_points, batch)
    length_schedule = make_length_schedule(config.data.length_points, T, seq)
    _check_batch(config, data * fsdp)
    _check_probes(config)
    _check_vocabulary(config, tensor)
    _check_smoothing(config)
    examples = make_examples(config)
    _check_source(config, examples)
    _check_cutting(config, examples)
    source_len = _source_len(config, examples, seq)
    return config, Derived(
        batch, batch_schedule, length_schedule, sharing, reason, layout, examples, source_len
    )


def _check_layer_decay(config: Config) -> None:
    """UserError where the family has no stack of layers whose learning rates could differ."""
    if config.optimizer.layer_decay != 1 and "transformer" not in FAMILIES[config.model.family].sections:
        raise UserError(
            f"optimizer.layer_decay={config.optimizer.layer_decay} needs a stack of layers, which "
            f"model.family={config.model.family!r} does not have; set it to 1"
        )


def _check_patience(config: Config) -> None:
    """UserError where train.patience waits for evaluations that are never made."""
    data, patience = config.data, config.train.patience
    if not patience:
        return
    if not config.evaluate.every:
        raise UserError(
            f"train.patience={patience} counts evaluations, and evaluate.every=0 makes none before the end; set "
            "evaluate.every, or train.patience to 0"
        )
    if not (data.held_out_fraction or data.held_out_sources):
        raise UserError(
            f"train.patience={patience} counts evaluations on held-out text, of which data.held_out_fraction=0 leaves "
            "none; raise it, or set train.patience to 0"
        )


def _check_batch(config: Config, shards: int) -> None:
    """UserError where two keys decide the size of updates, and where `shards` devices cannot share an evaluation."""
    schedule = config.train.batch_schedule
    if RULES[config.controller.name].decides and schedule != "constant":
        raise UserError(
            f"controller.name={config.controller.name!r} and train.batch_schedule={schedule!r} both decide "
            "the batch size; set controller.name=none or train.batch_schedule=constant"
        )
    if config.evaluate.batch_size % shards:
        raise UserError(
            f"evaluate.batch_size={config.evaluate.batch_size} is not divisible by the {shards} shards of "
            "the batch (mesh.data x mesh.fsdp); change one of them"
        )


def _check_vocabulary(config: Config, tensor: int) -> None:
    """UserError where mesh.tensor does not divide the ids of a tokenizer that is to be trained."""
    # The size of a tokenizer that is given or not trained is known only once it is loaded, see `build/program.py`.
    own = config.tokenizer
    if not own.path and KINDS[own.kind].trained and own.vocab_size % tensor:
        raise UserError(
            f"tokenizer.vocab_size={own.vocab_size} is not divisible by mesh.tensor={tensor}; change one of them"
        )


def make_examples(config: Config) -> Examples:
    """What turns records into examples of the config's task."""
    data, name = config.data, config.task.name
    reads_source = FAMILIES[config.model.family].reads_source
    keys = config.tasks.get(name)
    return EXAMPLES[name](ExampleSetting(data.text_field, data.seq_len, keys, reads_source, data.source_len))


def _check_sight(config: Config) -> None:
    """UserError where the family sees the tokens that the task predicts, or does not see those that it may."""
    family, task = config.model.family, config.task.name
    sees, may_see = FAMILIES[family].sees_both_sides, TASKS[task].sees_both_sides
    if may_see is not None and sees != may_see:
        side = "both sides of a token" if may_see else "only what comes before a token"
        tasks = [name for name, kind in TASKS.items() if kind.sees_both_sides in (sees, None)]
        families = [name for name, kind in FAMILIES.items() if kind.sees_both_sides == may_see]
        raise UserError(
            f"task.name={task!r} needs a family that sees {side}, not model.family={family!r}; set "
            f"model.family={' or '.join(families)}, or task.name={' or '.join(tasks)}"
        )
    if sees and config.evaluate.probes:
        raise UserError(
            f"evaluate.probes={config.evaluate.probes} predict the next token, which model.family={family!r} sees; "
            "set evaluate.probes to ()"
        )
    if may_see is None and config.evaluate.probes:
        raise UserError(
            f"evaluate.probes={config.evaluate.probes} predict the next token, which task.name={task!r} does not; "
            "set evaluate.probes to ()"
        )


def _check_smoothing(config: Config) -> None:
    """UserError where labels are smoothed and logits soft-capped, see `ops/losses/label_smoothing.py`."""
    smoothing = getattr(config.tasks.get(config.task.name), "label_smoothing", 0.0)
    if smoothing and config.model.logit_softcap:
        raise UserError(
            f"translation.label_smoothing={smoothing} needs logits without a soft-cap; set model.logit_softcap=0, "
            "or translation.label_smoothing=0"
        )


def _check_source(config: Config, examples: Examples) -> None:
    """UserError where the family does not read the second stream of the task, or waits for one in vain."""
    family, task = config.model.family, config.task.name
    # The second text of a pair is read as the first.
    read_apart = "source" in examples.columns and not isinstance(TASKS[task], ReadsPairs)
    if FAMILIES[family].reads_source == read_apart:
        return
    if FAMILIES[family].reads_source:
        raise UserError(
            f"model.family={family!r} reads a second text, which task.name={task!r} does not have; set "
            "task.name=translation or span_corruption, or another model.family"
        )
    families = " or ".join(name for name, kind in FAMILIES.items() if kind.reads_source)
    raise UserError(
        f"task.name={task!r} has a second text, which model.family={family!r} does not read; set "
        f"model.family={families}"
    )


def _check_cutting(config: Config, examples: Examples) -> None:
    """UserError for keys that cut documents if those of the task have more than a text, such as a translation."""
    data, number = config.data, len(fields_within(examples.fields))
    if "label" in examples.columns:
        if data.hold_out == "tails":
            raise UserError(
                f"data.hold_out='tails' cuts texts, and for task.name={config.task.name!r} each has a label as a "
                "whole; set it to documents"
            )
        if data.length_points:
            raise UserError(
                f"data.length_points={data.length_points} cuts rows, and for task.name={config.task.name!r} the texts "
                "in them have labels as a whole; set data.length_points to ()"
            )
    of_several = isinstance(examples, Structured)
    has = "messages" if of_several else f"{number} fields"
    for key, value, whole in (("split_on", data.split_on, ""), ("hold_out", data.hold_out, "documents")):
        if (number > 1 or of_several) and value not in (whole, "auto"):
            raise UserError(
                f"data.{key}={value!r} cuts documents of one text, and those of task.name={config.task.name!r} have "
                f"{has} that belong together; set it to {whole!r}"
            )


def _source_len(config: Config, examples: Examples, seq: int) -> int:
    """Positions of the second stream in a row, 0 where the task has none; UserError for keys that do not go with it."""
    data, name = config.data, config.task.name
    if "source" not in examples.columns:
        if data.source_len:
            raise UserError(
                f"data.source_len={data.source_len} is without effect for task.name={name!r}, which has one stream of "
                "tokens; set it to 0"
            )
        return 0
    table, length = (
        FAMILIES[config.model.family].position_table(config.families),
        data.source_len or data.seq_len,
    )
    if table and length > data.seq_len:
        raise UserError(
            f"data.source_len={length} is more than data.seq_len={data.seq_len}, for which {table} has positions; "
            "lower it, or raise data.seq_len"
        )
    if data.length_points:
        raise UserError(
            f"data.length_points={data.length_points} cuts rows, and task.name={name!r} has a second stream of tokens "
            "that cannot be cut with them; set data.length_points to ()"
        )
    if config.evaluate.probes:
        raise UserError(
            f"evaluate.probes={config.evaluate.probes} are texts of one stream, and task.name={name!r} has two; "
            "set evaluate.probes to ()"
        )
    if length % seq:
        raise UserError(f"data.source_len={length} is not divisible by mesh.seq={seq}; change one of them")
    return length


def choose_layout(config: Config, chunks: int) -> RowLayout:
    """Which token of a sequence lies on which device. `chunks` is the number of parts in which its keys travel."""
    if chunks == 1:
        return RowLayout()
    # Cutting by documents balances a ring whatever the documents are. The cut keeps to multiples of about the number of
    # tokens that attention takes at a time, which is larger in long shards.
    name = "documents" if config.mesh.layout == "auto" else config.mesh.layout
    return RowLayout(name, chunks, block=512 if config.data.seq_len // chunks >= 8192 else 128)


def _check_probes(config: Config) -> None:
    probes, lengths, T = config.evaluate.probes, config.evaluate.probe_lengths, config.data.seq_len
    for name in probes:
        if name not in PROBES:
            hint = did_you_mean(name, PROBES) or f"; use some of {', '.join(PROBES)}"
            raise UserError(f"evaluate.probes has {name!r}, which is not known{hint}")
    if probes and not (config.data.held_out_fraction or config.data.held_out_sources):
        raise UserError(
            f"evaluate.probes={probes} need held-out documents but data.held_out_fraction=0 leaves none; "
            "raise it, or set evaluate.probes to ()"
        )
    table = FAMILIES[config.model.family].position_table(config.families)
    if table and max(lengths, default=0) > T:
        raise UserError(
            f"evaluate.probe_lengths has {max(lengths)}, but {table} has positions for data.seq_len={T} tokens only; "
            f"use at most {T}"
        )
