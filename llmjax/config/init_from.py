"""A run that begins with the parameters of another run (checkpoint.init_from), and the tokenizer of a run.

The new run takes over the parameters and the tokenizer, so that token ids mean the same. It does not take over the
state of the optimizer or the data cursor. Whether the two runs fit is checked before anything is read. Once the new run
has a checkpoint of its own, it goes on from there and no longer needs the other run.

Instead of a workdir, checkpoint.init_from may name a folder of `transformers` or a GGUF file (`convert/foreign.py`).
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from llmjax.config.imported import imported_config
from llmjax.config.resolve import resolve_config
from llmjax.config.resume import check_init, check_resume, keep_choices
from llmjax.config.schema import Config
from llmjax.convert import foreign
from llmjax.convert.foreign import is_foreign, open_foreign
from llmjax.data.checksums import DamagedError
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.escapes import complain
from llmjax.models.table import FAMILIES
from llmjax.terminal.lines import warn
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.checkpoint.which import named_updates
from llmjax.types import Params
from llmjax.workdir.contents import check_name, saved_config
from llmjax.workdir.standing import has_begun

# The sections without which a config.json is not the one of a trained run.
SECTIONS = {"model", "data", "tokenizer", "optimizer"}


def check_initial(config: Config, workdir: pathlib.Path) -> None:
    """UserError where the run in `workdir` cannot begin with checkpoint.init_from; nothing once it has begun."""
    name = config.checkpoint.init_from
    if not name or has_begun(workdir):
        return
    source = pathlib.Path(name)
    check_name(f"checkpoint.init_from={name!r}", source, "move that run")
    if source.suffix == ".gguf" and not source.is_file():
        raise UserError(f"checkpoint.init_from={name!r} does not exist; fetch the file, or correct its path")
    if is_foreign(source):
        _check_foreign(config, source)
        return
    saved = saved_config(source)
    left = [source / folder for folder in ("checkpoints", "tokenizer")]
    if saved is None or not saved.keys() >= SECTIONS or not all(folder.is_dir() for folder in left):
        raise UserError(f"checkpoint.init_from={name!r} holds no trained run; give the workdir of one")
    check_init(saved, config)
    # A config may name a tokenizer of its own only if its ids mean the same.
    path = config.tokenizer.path
    if path and load_tokenizer(path).fingerprint != load_tokenizer(source / "tokenizer").fingerprint:
        raise UserError(
            f"tokenizer.path={path!r} is not the tokenizer that the run in checkpoint.init_from={name!r} was trained "
            "with, so its ids mean something else; leave tokenizer.path empty"
        )
    # Reading what a checkpoint says of itself shows whether it is there and undamaged.
    which = config.checkpoint.init_checkpoint
    with Checkpoints(source / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        for update in named_updates(checkpoints, "checkpoint.init_checkpoint", which):
            checkpoints.read_meta(update)


def _check_foreign(config: Config, source: pathlib.Path) -> None:
    """UserError where a run of `config` cannot begin with the model at `source`. No tensor is read."""
    name, model = config.checkpoint.init_from, open_foreign(source)
    if config.checkpoint.init_checkpoint != "latest":
        raise UserError(
            f"checkpoint.init_checkpoint={config.checkpoint.init_checkpoint!r} has no meaning for "
            f"checkpoint.init_from={name!r}, which holds one model; leave it at latest"
        )
    # A tokenizer that is named comes first. It may be the user's own, if the model brings none that is read here.
    path = config.tokenizer.path or str(model.tokenizer or "")
    if not path:
        raise UserError(
            f"checkpoint.init_from={name!r} has no tokenizer that is read here (tokenizer.model, tokenizer.json, "
            "vocab.json with merges.txt, or vocab.txt); give the path of its tokenizer in tokenizer.path"
        )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.vocab_size
    model.check_start(tokenizer.bos_id)
    if ids != model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {ids} ids, and checkpoint.init_from={name!r} has {model.vocab_size} embeddings; "
            "make a workdir of it with tools.convert, and begin with that"
        )
    there, _ = resolve_config(imported_config(model.settings, path), 1)
    check_init(there.to_dict(), config)
    _note_other_keys(there, config, name)
    model.match(model.places(_shapes(there, ids)))


def _note_other_keys(there: Config, config: Config, name: str) -> None:
    """Says which keys a run may change, because they shape no parameter, and has changed: the model is another then."""
    theirs, ours = there.to_dict(), config.to_dict()
    changed = []
    for path in FAMILIES[config.model.family].free_on_init:
        section, key = path.split(".")
        if theirs[section][key] != ours[section][key]:
            changed.append(f"{path}={theirs[section][key]}, here {ours[section][key]}")
    if changed:
        warn(
            f"note: the model in checkpoint.init_from={name!r} was trained with {'; '.join(changed)}; set "
            "what is not meant to differ"
        )


def _shapes(config: Config, vocab_size: int) -> Params:
    """Shapes of the parameters of a resolved config."""
    family = FAMILIES[config.model.family]
    model = family.model(family.config(config.model, config.families), vocab_size, config.data.seq_len)
    return jax.eval_shape(model.init, jax.random.key(0))


def with_tokenizer(config: Config, workdir: pathlib.Path) -> Config:
    """`config` with the path of the tokenizer that the run in `workdir` must use.

    A run that has begun keeps its tokenizer, even if its documents have changed since. A run that begins with the
    parameters of another run takes the tokenizer of that run. In all other cases `config` comes back unchanged.
    """
    if has_begun(workdir) and resumes(config, workdir) and _holds_tokenizer(workdir):
        path = workdir / "tokenizer"
    elif config.checkpoint.init_from and not config.tokenizer.path:
        path = tokenizer_of(pathlib.Path(config.checkpoint.init_from))
    else:
        return config
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(path)))


def tokenizer_of(source: pathlib.Path) -> pathlib.Path:
    """Where the tokenizer lies that a run takes over from `source`, a workdir or a model of another program."""
    return (foreign.tokenizer_of(source) if is_foreign(source) else None) or source / "tokenizer"


def own_tokenizer(workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer of the run in `workdir`, for a mode that reads no documents; UserError where it is lost."""
    if not has_begun(workdir):
        raise UserError(f"{workdir} holds no trained model; train one first, or give its --workdir")
    try:
        return load_tokenizer(workdir / "tokenizer")
    except DamagedError as error:
        raise UserError(
            f"{error.reason}; restore it, or let --mode=evaluate make it again from data.sources"
        ) from None


def resumes(config: Config, workdir: pathlib.Path) -> bool:
    """Whether training with `config` would go on with the run in `workdir`: there is one, of a config that fits."""
    saved = saved_config(workdir)
    try:
        if saved is not None:
            check_resume(saved, config, str(workdir))
    except UserError:
        return False
    return saved is not None


def as_begun(config: Config, workdir: pathlib.Path) -> Config:
    """`config` as training would go on with the run in `workdir`; unchanged if training would not go on with it."""
    try:
        saved = saved_config(workdir)
        kept = config if saved is None else keep_choices(saved, config, str(workdir))
        return kept if resumes(kept, workdir) else config
    except UserError:
        return config


def _holds_tokenizer(workdir: pathlib.Path) -> bool:
    """Whether the tokenizer of the run in `workdir` is there and undamaged. If not, the user is told why."""
    try:
        load_tokenizer(workdir / "tokenizer")
    except DamagedError as error:
        complain(f"{error.reason}; it is made again if data.sources hold the documents that it was made of")
        return False
    return True
