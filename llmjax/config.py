"""The one reader of a ConfigDict: it becomes frozen dataclasses here, with every rule that crosses sections checked.

Each section of a config file is one dataclass that lives beside its owner, with the same keys, no more and no fewer: a
key that nobody reads cannot be set. Nothing after this file sees a ConfigDict.

A config file has every key. The config.json of an older run has none of the keys that are newer than the run: there the
default of the dataclass is taken, so the default of a new key must keep the meaning of the runs that did not know it.
What new runs do is said by configs/base.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from llmjax.data.layout import RowLayout
from llmjax.data.pipeline import DataConfig
from llmjax.data.tokenizer import KINDS, TokenizerConfig
from llmjax.errors import UserError
from llmjax.evaluate.held_out import EvaluateConfig
from llmjax.evaluate.probes import PROBES
from llmjax.generate.generate import GenerateConfig
from llmjax.nn.choice import choose_sharing
from llmjax.nn.config import ModelConfig, resolve
from llmjax.nn.position import POSITIONS
from llmjax.parallel.mesh import MeshConfig, mesh_shape
from llmjax.ranges import FOLD, Range, check_ranges, shown
from llmjax.train.batch import BatchArithmetic, make_batch_schedule, resolve_batch
from llmjax.train.checkpoint import CheckpointConfig
from llmjax.train.config import TrainConfig
from llmjax.train.controller import RULES, ControllerConfig
from llmjax.train.lengths import make_length_schedule
from llmjax.train.optimizer import OptimizerConfig
from llmjax.train.stability import StabilityConfig


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The `plan` section: `topology` names a TPU to compile for (see plan/topology); "" means the devices at hand."""

    topology: str


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    seed: Annotated[int, Range(0, FOLD)]
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    mesh: MeshConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    controller: ControllerConfig
    stability: StabilityConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig
    generate: GenerateConfig
    plan: PlanConfig

    def __post_init__(self) -> None:
        check_ranges("", self)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON would give them back."""
        sections = dataclasses.asdict(self)
        return {
            name: {key: list(x) if isinstance(x, tuple) else x for key, x in section.items()}
            if isinstance(section, dict)
            else section
            for name, section in sections.items()
        }


# The keys that every version has written: a saved config without one of them is damaged. All others have a default.
FIRST_KEYS = {
    "": "seed",
    "model": "family num_layers model_dim num_heads num_kv_heads head_dim mlp_dim activation norm norm_eps position "
    "rope_theta qk_norm use_bias tie_embeddings logit_softcap dropout init_std scan_layers remat attention dtype",
    "tokenizer": "kind path vocab_size train_bytes character_coverage num_reserved",
    "data": "sources text_field on_bad_text seq_len held_out_fraction cache_dir num_workers prefetch",
    "mesh": "data fsdp seq tensor",
    "train": "num_updates tokens_per_update micro_batch_size accumulation_steps z_loss",
    "optimizer": "name learning_rate schedule warmup_updates final_lr_fraction decay_fraction beta1 beta2 eps "
    "weight_decay clip_norm",
    "evaluate": "every batch_size",
    "checkpoint": "every keep keep_best",
    "generate": "max_tokens temperature top_k top_p seed",
    "plan": "topology",
}


def read(raw: Mapping[str, Any]) -> Config:
    """The Config of nested mappings that have every key; UserError names the first wrong one."""
    return _read_section(Config, raw, "")


def complete(saved: Mapping[str, Any], workdir: Any) -> dict[str, Any]:
    """The saved config of the run in `workdir` with the defaults of the keys that are newer than the run.

    UserError where a key is not known here, as in the run of a newer version, and where one is missing that every
    version has written.
    """
    return _complete_section(Config, saved, "", f"{workdir}/config.json")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    return typing.get_type_hints(cls)


def _complete_section(cls: type, saved: Any, section: str, path: str) -> dict[str, Any]:
    prefix = f"{section}." if section else ""
    if not isinstance(saved, Mapping):
        raise UserError(f"{path} has {section}={shown(saved)}, which is no section of keys; restore the file")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in saved:
        if key not in fields:
            raise UserError(
                f"{path} has the key {prefix}{key}, which this version of llmjax does not know"
                f"{did_you_mean(key, fields)}; use the version that wrote it"
            )
    hints, values = _hints(cls), {}
    for key, field in fields.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _complete_section(hints[key], saved.get(key, {}), prefix + key, path)
        elif key in saved:
            values[key] = saved[key]
        elif key in FIRST_KEYS.get(section, "").split():
            raise UserError(f"{path} lacks the key {prefix}{key}, which every run has; restore the file")
        else:
            values[key] = list(field.default) if isinstance(field.default, tuple) else field.default
    return values


def read_optimizer(saved: Mapping[str, Any], workdir: Any) -> OptimizerConfig:
    """The optimizer of the saved config of the run in `workdir`."""
    return _read_section(OptimizerConfig, complete(saved, workdir)["optimizer"], "optimizer.")


def _read_section(cls: type, raw: Mapping[str, Any], prefix: str) -> Any:
    hints = _hints(cls)
    for key in raw:
        if key not in hints:
            raise UserError(f"config key {prefix}{key} is not known{did_you_mean(key, hints)}")
    missing = [key for key in hints if key not in raw]
    if missing:
        raise UserError(
            f"config key {prefix}{missing[0]} is missing; start from configs/base.py, which lists every key"
        )
    values = {}
    for key, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            if not isinstance(raw[key], Mapping):
                raise UserError(
                    f"config key {prefix}{key}={shown(raw[key])} must be a section of keys; start from configs/base.py"
                )
            values[key] = _read_section(hint, raw[key], f"{prefix}{key}.")
        else:
            values[key] = _read_value(raw[key], hint, prefix + key)
    return cls(**values)


def _read_value(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`, or a UserError; an int may stand for a float, one string for a tuple of strings, and
    strings for whole numbers in a tuple."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # no float is so large, and no range either: it stays what it is
            return value
    if hint == tuple[int, ...]:
        values = value if isinstance(value, list | tuple) else (value,)
        if (numbers := _whole_numbers(values)) is not None:
            return numbers
    elif typing.get_origin(hint) is tuple:
        values = (value,) if isinstance(value, str) else value
        if isinstance(values, list | tuple) and all(isinstance(v, str) for v in values):
            _check_text(value, values, key)
            return tuple(part for v in values for part in v.split(",") if part)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if isinstance(value, str):
            _check_text(value, (value,), key)
        return value
    lists = {tuple[int, ...]: "list of whole numbers"}
    name = hint.__name__ if isinstance(hint, type) else lists.get(hint, "list of strings")
    raise UserError(f"{key}={shown(value)} is of type {type(value).__name__}; give a value of type {name}")


def _whole_numbers(values: Sequence[Any]) -> tuple[int, ...] | None:
    """The whole numbers in `values`, which may be numbers or texts with commas between them; None for others."""
    if not all(isinstance(v, int | str) and not isinstance(v, bool) for v in values):
        return None
    parts: list[Any] = []
    for v in values:
        parts += [part for part in v.split(",") if part] if isinstance(v, str) else [v]
    try:
        return tuple(map(int, parts))
    except ValueError:
        return None


def _check_text(value: Any, texts: Sequence[str], key: str) -> None:
    """UserError for the character of code 0, which ends a text wherever the operating system reads it."""
    if any("\0" in text for text in texts):
        raise UserError(
            f"{key}={shown(value)} has a character of code 0, which no name can hold; leave it out"
        )


def did_you_mean(word: str, words: typing.Iterable[str]) -> str:
    """The end of an error message: the likeliest of `words`, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check(config: Config, num_devices: int) -> tuple[Config, BatchArithmetic]:
    """`config` with the model's derived sizes filled in, and the arithmetic of its batches on `num_devices` devices.

    Every rule that crosses sections is checked here, before anything is read, compiled or written.
    """
    config = dataclasses.replace(config, model=resolve(config.model))
    data, fsdp, seq, tensor = mesh_shape(config.mesh, num_devices)
    model, T = config.model, config.data.seq_len
    if T % seq:
        raise UserError(f"data.seq_len={T} is not divisible by mesh.seq={seq}; change one of them")
    for key, size in (
        ("num_heads", model.num_heads),
        ("num_kv_heads", model.num_kv_heads),
        ("mlp_dim", model.mlp_dim),
    ):
        if size % tensor:
            raise UserError(
                f"model.{key}={size} is not divisible by mesh.tensor={tensor}; change one of them"
            )
    sharing, _ = choose_sharing(
        model, config.mesh, {"data": data, "fsdp": fsdp, "seq": seq, "tensor": tensor}
    )
    row_layout(config, 1 if sharing is None else sharing.chunks).check(T)
    if model.model_dim % (fsdp * seq):
        raise UserError(
            f"model.model_dim={model.model_dim} is not divisible by mesh.fsdp x mesh.seq={fsdp * seq}, over which "
            "parameters are split; change one of them"
        )
    if model.window > T:
        raise UserError(
            f"model.window={model.window} is longer than data.seq_len={T}; use at most {T}, or 0 for no window"
        )
    train = config.train
    batch = resolve_batch(
        train.tokens_per_update, T, train.micro_batch_size, train.accumulation_steps, data * fsdp
    )
    make_batch_schedule(train.batch_schedule, train.batch_points, batch)
    make_length_schedule(config.data.length_points, T, seq)
    if RULES[config.controller.name].decides and train.batch_schedule != "constant":
        raise UserError(
            f"controller.name={config.controller.name!r} and train.batch_schedule={train.batch_schedule!r} both decide "
            "the batch size; set controller.name=none or train.batch_schedule=constant"
        )
    if config.evaluate.batch_size % (data * fsdp):
        raise UserError(
            f"evaluate.batch_size={config.evaluate.batch_size} is not divisible by the {data * fsdp} shards of "
            "the batch (mesh.data x mesh.fsdp); change one of them"
        )
    _check_probes(config)
    if (
        not config.tokenizer.path
        and KINDS[config.tokenizer.kind].trained
        and config.tokenizer.vocab_size % tensor
    ):
        raise UserError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} is not divisible by mesh.tensor={tensor}; "
            "change one of them"
        )
    return config, batch


def row_layout(config: Config, chunks: int) -> RowLayout:
    """Which token of a sequence lies on which device, if queries and keys meet in so many `chunks` of it."""
    if chunks == 1:
        return RowLayout()
    name = "documents" if config.mesh.layout == "auto" else config.mesh.layout
    return RowLayout(name, chunks, block=512 if config.data.seq_len // chunks >= 8192 else 128)


def _check_probes(config: Config) -> None:
    probes, lengths, T = config.evaluate.probes, config.evaluate.probe_lengths, config.data.seq_len
    for name in probes:
        if name not in PROBES:
            hint = did_you_mean(name, PROBES) or f"; use some of {', '.join(PROBES)}"
            raise UserError(f"evaluate.probes has {name!r}, which is not known{hint}")
    if probes and not config.data.held_out_fraction:
        raise UserError(
            f"evaluate.probes={probes} need held-out documents but data.held_out_fraction=0 leaves none; "
            "raise it, or set evaluate.probes to ()"
        )
    if POSITIONS[config.model.position].table and max(lengths, default=0) > T:
        raise UserError(
            f"evaluate.probe_lengths has {max(lengths)}, but model.position={config.model.position!r} has positions "
            f"for data.seq_len={T} tokens only; use at most {T}"
        )


FREE_ON_RESUME = (
    "mesh", "controller", "stability", "evaluate", "generate", "plan",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
    "train.num_updates", "train.batch_schedule", "train.batch_points", "train.micro_batch_size",
    "train.accumulation_steps", "train.accumulation", "train.fused_gather", "train.statistics_every",
    "data.sources", "data.length_points", "data.cache_dir", "data.num_workers", "data.prefetch",
    "optimizer.learning_rate", "optimizer.offload", "optimizer.schedule_updates",
    "model.scan_layers", "model.remat", "model.offload", "model.tile", "model.attention",
)  # fmt: skip


def check_resume(saved: Mapping[str, Any], config: Config, workdir: str) -> None:
    """UserError where `config` means another run than the one saved in `workdir`, naming the keys.

    What only says how the work is cut, how long it goes on, or what is written beside it may change; so may what
    is there to be changed under way: how batch and sequences grow, what is done about spikes, and the learning rate,
    which is lowered to go on from before a divergence.
    """
    old, new = _flatten(complete(saved, workdir)), _flatten(config.to_dict())
    changed = [key for key in sorted(new) if old.get(key) != new[key]]
    changed = [
        key for key in changed if key not in FREE_ON_RESUME and key.split(".")[0] not in FREE_ON_RESUME
    ]
    if changed:
        text = ", ".join(f"{key} ({shown(old.get(key))} there, {shown(new[key])} here)" for key in changed)
        raise UserError(
            f"workdir {workdir} holds a run of another config: {text}; use another --workdir or the old values"
        )


FREE_ON_INIT = (
    "rope_theta", "rope_scaling", "rope_factor", "rope_original_len", "logit_softcap", "window", "global_every",
    "attention_softcap", "dropout", "init_std", "scan_layers", "remat", "offload", "tile",
    "attention", "dtype",
)  # fmt: skip


def check_init(saved: Mapping[str, Any], config: Config) -> None:
    """UserError where a run of `config` cannot begin with the parameters of the run of config `saved`.

    What does not shape the parameters may differ: how positions turn, what attention sees, how it is computed.
    """
    source = f"the run in checkpoint.init_from={config.checkpoint.init_from!r}"
    saved, new = complete(saved, config.checkpoint.init_from), config.to_dict()
    there, here = saved["model"], new["model"]
    for key in here:
        if key not in FREE_ON_INIT and here[key] != there[key]:
            raise UserError(
                f"model.{key}={here[key]!r}, but {source} has {there[key]!r}; use that value to begin with its "
                "parameters"
            )
    length = saved["data"]["seq_len"]
    if POSITIONS[config.model.position].table and config.data.seq_len != length:
        raise UserError(
            f"model.position={config.model.position!r} knows the {length} positions of {source} and no others, not "
            f"those of data.seq_len={config.data.seq_len}; keep {length}, or extend a model of model.position=rope"
        )
    there, here = saved["tokenizer"], new["tokenizer"]
    if there["path"] or here["path"]:
        return
    for key in here:
        if here[key] != there[key]:
            raise UserError(
                f"tokenizer.{key}={here[key]!r}, but {source} has {there[key]!r}, and its tokenizer is used; "
                "set the same value"
            )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
