"""Which keys may change when a run goes on, and which when a new run begins with another run's parameters."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.config.reading import complete_config
from llmjax.config.schema import Config
from llmjax.convert.foreign import is_foreign, tokenizer_of
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.errors import UserError, choose
from llmjax.models.family import Family
from llmjax.models.table import FAMILIES
from llmjax.ranges import shown
from llmjax.workdir.standing import has_begun

# The sections and keys that may change when a run goes on. The sections `mesh` and `compute` only say how the work is
# cut and where things lie.
FREE_ON_RESUME = (
    "mesh", "compute", "controller", "stability", "evaluate", "metrics", "generate", "embed", "serve",
    "plan",
    "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best",
    "train.num_updates", "train.batch_schedule", "train.batch_points", "train.statistics_every", "train.patience",
    "data.sources", "data.held_out_sources", "data.follow_links", "data.max_expansion",
    "data.length_points", "data.cache_dir", "data.num_workers", "data.prefetch",
    "optimizer.learning_rate", "optimizer.schedule_updates", "lora.init_from",
)  # fmt: skip


def check_resume(saved: Mapping[str, Any], config: Config, workdir: str) -> None:
    """UserError, with the keys, where `config` means another run than the one saved in `workdir`.

    A key may change if it only says how the work is cut, how long the run goes on, or what is written beside it. So may
    the keys that are there to be changed under way: how batch and sequences grow, what is done about spikes, and the
    learning rate, which a user lowers to go on from before a divergence. A tokenizer and a run to begin with may have
    moved.
    """
    old, new = _flatten(complete_config(saved, workdir)), _flatten(config.to_dict())
    changed = [key for key in sorted(new) if old.get(key) != new[key]]
    changed = [
        key
        for key in changed
        if key not in FREE_ON_RESUME
        and key.split(".")[0] not in FREE_ON_RESUME
        and not (key in SAME_CONTENT and old.get(key) and SAME_CONTENT[key](new[key], pathlib.Path(workdir)))
    ]
    if changed:
        text = ", ".join(f"{key} ({shown(old.get(key))} there, {shown(new[key])} here)" for key in changed)
        raise UserError(
            f"workdir {workdir} holds a run of another config: {text}; use the old values, or another --workdir, which "
            f"--config.checkpoint.init_from={workdir} lets begin with the parameters of this run"
        )


def _is_tokenizer(path: str, workdir: pathlib.Path) -> bool:
    """Whether the tokenizer at `path` is the one of the run in `workdir`, which keeps a copy of it."""
    try:
        return load_tokenizer(path).fingerprint == load_tokenizer(workdir / "tokenizer").fingerprint
    except (UserError, OSError):
        return False


def _has_tokenizer(folder: str, workdir: pathlib.Path) -> bool:
    """Whether the run in `folder` has the tokenizer of the run in `workdir`, which was taken from where it began.

    Nothing else is read from there once the run has a checkpoint of its own.
    """
    source = pathlib.Path(folder)
    found = (tokenizer_of(source) if is_foreign(source) else None) or source / "tokenizer"
    return has_begun(workdir) and _is_tokenizer(str(found), workdir)


# Paths that may change when what lies there is the same -> (path, workdir) -> whether it is.
SAME_CONTENT: dict[str, Callable[[str, pathlib.Path], bool]] = {
    "tokenizer.path": _is_tokenizer,
    "checkpoint.init_from": _has_tokenizer,
}


def keep_hold_out(saved: Mapping[str, Any], config: Config, workdir: str) -> Config:
    """`config` with the `data.hold_out` of the run saved in `workdir`, if `config` leaves it to be chosen.

    A run goes on with the text that it began to hold out. The config of a run that is older than the key says
    "documents", and the command that began it now says "auto".
    """
    if config.data.hold_out != "auto":
        return config
    hold_out = complete_config(saved, workdir)["data"]["hold_out"]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, hold_out=hold_out))


def keep_labels(saved: Mapping[str, Any], config: Config, workdir: str) -> Config:
    """`config` with the labels of the run saved in `workdir`, if `config` leaves them to be found.

    The numbers of the classes are those of the labels in this order, whatever documents are read later.
    """
    keys, complete = config.tasks["classification"], complete_config(saved, workdir)
    if keys.labels or complete["task"]["name"] != config.task.name:
        return config
    labels = tuple(complete["classification"]["labels"])
    return dataclasses.replace(config, **{"classification": dataclasses.replace(keys, labels=labels)})


def keep_choices(saved: Mapping[str, Any], config: Config, workdir: str) -> Config:
    """`config` with everything that the run saved in `workdir` has chosen and that `config` leaves open."""
    return keep_labels(saved, keep_hold_out(saved, config, workdir), workdir)


# The keys of `model` that do not shape the parameters. Each family has further ones in its sections.
FREE_ON_INIT = ("model.logit_softcap", "model.dropout", "model.init_std", "model.dtype")


def check_init(saved: Mapping[str, Any], config: Config) -> None:
    """UserError where a run of `config` cannot begin with the parameters of the run whose saved config is `saved`.

    Keys that do not shape the parameters may differ: how rotary positions turn, which tokens attention sees, the dtype
    of the computation.
    """
    kind = "model" if is_foreign(pathlib.Path(config.checkpoint.init_from)) else "run"
    source = f"the {kind} in checkpoint.init_from={config.checkpoint.init_from!r}"
    saved, new = complete_config(saved, config.checkpoint.init_from), config.to_dict()
    family = choose(FAMILIES, "model.family", config.model.family)
    free, anew = (*FREE_ON_INIT, *family.free_on_init), made_anew(saved, new, family)
    keys = [(section, key) for section in ("model", *family.sections) for key in new[section]]
    others = {
        f"{section}.{key}": (new[section][key], saved[section][key])
        for section, key in keys
        if new[section][key] != saved[section][key] and f"{section}.{key}" not in (*free, *anew)
    }
    if others:
        (name, (here, there)), *rest = others.items()
        also = "".join(f", {other}={value!r}" for other, (_, value) in rest)
        raise UserError(
            f"{name}={here!r}, but {source} has {there!r}; use that value to begin with its parameters"
            + (f", and also {also[2:]}" if also else "")
        )
    if anew and config.lora.rank:
        key = next(iter(anew))
        raise UserError(
            f"{key}=True adds a part that {source} does not have, and lora.rank={config.lora.rank} freezes all but the "
            f"adapters, so that it would stay as random as it begins; set {key}=False, or lora.rank=0"
        )
    length = saved["data"]["seq_len"]
    table = family.position_table(config.families)
    if table and config.data.seq_len != length:
        raise UserError(
            f"{table} knows the {length} positions of {source} and no others, not those of "
            f"data.seq_len={config.data.seq_len}; keep {length}, or extend a model of transformer.position=rope"
        )
    # A tokenizer given by its path is compared by its contents, in `init_from`.
    there, here = saved["tokenizer"], new["tokenizer"]
    if there["path"] or here["path"]:
        return
    for key in here:
        if here[key] != there[key]:
            raise UserError(
                f"tokenizer.{key}={here[key]!r}, but {source} has {there[key]!r}, and its tokenizer is used; "
                "set the same value"
            )


def made_anew(saved: Mapping[str, Any], new: Mapping[str, Any], family: Family) -> dict[str, str]:
    """The keys of `Family.optional` that `new` has on and `saved`, the config of a run to begin with, has off.

    Their entries of the tree of parameters, the values here, begin anew.
    """

    def has(config: Mapping[str, Any], key: str) -> bool:
        section, name = key.split(".")
        return bool(config[section][name])

    return {key: entry for key, entry in family.optional.items() if has(new, key) and not has(saved, key)}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their whole names, such as `model.num_layers`; a tuple becomes a list."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
