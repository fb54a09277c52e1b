"""A run that begins with another's parameters (checkpoint.init_from): what must fit is checked before anything is read.

The tokenizer comes along, so that token ids mean the same; optimizer state and data cursor do not. Once the run has a
checkpoint of its own, it goes on from that and needs the other no more.
"""

from __future__ import annotations

import dataclasses
import pathlib

from llmjax.config.resume import check_init, check_resume
from llmjax.config.schema import Config
from llmjax.data.checksums import DamagedError
from llmjax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llmjax.errors import UserError
from llmjax.escapes import complain
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.checkpoint.which import named_update
from llmjax.workdir.contents import check_name, saved_config
from llmjax.workdir.standing import has_begun

SECTIONS = {"model", "data", "tokenizer", "optimizer"}  # of a saved config, that are compared


def check_initial(config: Config, workdir: pathlib.Path) -> None:
    """UserError where the run in `workdir` has still to begin and checkpoint.init_from is nothing to begin with."""
    name = config.checkpoint.init_from
    if not name or has_begun(workdir):
        return
    source = pathlib.Path(name)
    check_name(f"checkpoint.init_from={name!r}", source, "move that run")
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
    """`config` with the tokenizer of the run in `workdir`, once it has begun, whatever the documents are by now.

    Before, it is the tokenizer of the run with whose parameters this one begins, if there is such a run.
    """
    if has_begun(workdir) and resumes(config, workdir) and _holds_tokenizer(workdir):
        path = workdir / "tokenizer"
    elif config.checkpoint.init_from and not config.tokenizer.path:
        path = pathlib.Path(config.checkpoint.init_from) / "tokenizer"
    else:
        return config
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(path)))


def own_tokenizer(workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer of the run in `workdir`, where nothing but the run is at hand."""
    if not has_begun(workdir):
        raise UserError(f"{workdir} holds no trained model; train one first, or give its --workdir")
    try:
        return load_tokenizer(workdir / "tokenizer")
    except DamagedError as error:
        raise UserError(
            f"{error.reason}; restore it, or let --mode=evaluate make it again from data.sources"
        ) from None


def resumes(config: Config, workdir: pathlib.Path) -> bool:
    """Whether training with `config` goes on with what is in `workdir`, rather than being refused."""
    saved = saved_config(workdir)
    try:
        if saved is not None:
            check_resume(saved, config, str(workdir))
    except UserError:
        return False
    return saved is not None


def _holds_tokenizer(workdir: pathlib.Path) -> bool:
    """Whether the tokenizer of the run in `workdir` is there and undamaged; what is wrong with it is said."""
    try:
        load_tokenizer(workdir / "tokenizer")
    except DamagedError as error:
        complain(f"{error.reason}; it is made again if data.sources hold the documents that it was made of")
        return False
    return True
