"""A run that begins with another's parameters (checkpoint.init_from): what must fit is checked before anything is read.

The tokenizer comes along, so that token ids mean the same; optimizer state and data cursor do not. Once the run has a
checkpoint of its own, it goes on from that and needs the other no more.
"""

from __future__ import annotations

import dataclasses
import pathlib

from llmjax.config import Config, check_init
from llmjax.data.tokenizer import load_tokenizer
from llmjax.errors import UserError
from llmjax.train.checkpoint import Checkpoints
from llmjax.train.which import named_update
from llmjax.workdir import saved_config

SECTIONS = {"model", "data", "tokenizer", "optimizer"}  # of a saved config, that are compared


def check_initial(config: Config, workdir: pathlib.Path) -> None:
    """UserError where the run in `workdir` has still to begin and checkpoint.init_from is nothing to begin with."""
    name = config.checkpoint.init_from
    if not name or _has_begun(workdir):
        return
    source = pathlib.Path(name)
    saved = saved_config(source)
    left = [source / folder for folder in ("checkpoints", "tokenizer")]
    if saved is None or not saved.keys() >= SECTIONS or not all(folder.is_dir() for folder in left):
        raise UserError(f"checkpoint.init_from={name!r} holds no trained run; give the workdir of one")
    check_init(saved, config)
    path = config.tokenizer.path
    if path and load_tokenizer(path).fingerprint != load_tokenizer(source / "tokenizer").fingerprint:
        raise UserError(
            f"tokenizer.path={path!r} is not the tokenizer that the run in checkpoint.init_from={name!r} was trained "
            "with, so its ids mean something else; leave tokenizer.path empty"
        )
    which = config.checkpoint.init_checkpoint
    with Checkpoints(source / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        checkpoints.read_meta(named_update(checkpoints, "checkpoint.init_checkpoint", which))


def with_tokenizer(config: Config, workdir: pathlib.Path) -> Config:
    """`config` with the tokenizer that a run which begins with another's parameters has from there."""
    if not config.checkpoint.init_from or config.tokenizer.path:
        return config
    own = workdir / "tokenizer"
    path = own if own.is_dir() else pathlib.Path(config.checkpoint.init_from) / "tokenizer"
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(path)))


def _has_begun(workdir: pathlib.Path) -> bool:
    checkpoints = workdir / "checkpoints"
    saved = checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir())
    return saved or (workdir / "window").is_dir()
