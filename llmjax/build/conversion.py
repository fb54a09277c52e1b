"""Models from elsewhere as workdirs of ours, and our workdirs as folders of `transformers` and GGUF files.

A model is opened, checked and read; then it is written whole or not at all: a mistake leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llmjax.build.exported_tokenizer import copy_tokenizer_files, facts_for_gguf, save_for_transformers
from llmjax.build.program import Program, make_program
from llmjax.build.restore import load_parts
from llmjax.build.tuning.adapters import save_adapters
from llmjax.config.imported import imported_config, settings_of
from llmjax.config.init_from import own_tokenizer
from llmjax.config.reading import complete_config, read_optimizer, read_tuning
from llmjax.config.resolve import resolve_config
from llmjax.config.schema import Config
from llmjax.convert import certificate, hf_folder, llama2c
from llmjax.convert.config_keys import TOKEN_IDS, choose_architecture
from llmjax.convert.gguf import export as gguf_export
from llmjax.convert.gguf import model as gguf_model
from llmjax.convert.places import places_of
from llmjax.convert.source import Source
from llmjax.data.tokenizer.imported import tokenizer_for
from llmjax.data.tokenizer.tokenizer import Tokenizer, save_template
from llmjax.data.tokenizer.vocabulary import words_without_text
from llmjax.errors import UserError, choose
from llmjax.files import new_folder
from llmjax.models.contract import ReadsSource
from llmjax.models.table import FAMILIES
from llmjax.ops.logits import head_logits
from llmjax.tasks.contract import AddsParameters
from llmjax.tasks.table import TASKS
from llmjax.terminal.lines import warn
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.loop.run_position import Position
from llmjax.types import Batch, Params
from llmjax.workdir import standing
from llmjax.workdir.contents import write_json

# What is opened, by --from.
OPEN: dict[str, Callable[[pathlib.Path], Source]] = {
    "hf": hf_folder.open_model,
    "gguf": gguf_model.open_model,
    "llama2c": llama2c.open_model,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that was read, from wherever it came.

    settings   our keys for it, as in `Source`
    program    runs it on one device
    tokenizer  its tokenizer, or None where it has none that is read here
    facts      what the certificate says of where it came from
    ids        the ids of the special tokens, by their names in config.json
    folder     the folder of transformers that it was read from, if it was one
    trained    the parameters that trained in the run, without the frozen ones; nothing for a model that is no run
    base       what the run began with (checkpoint.init_from), if anything
    chat_template  how a dialogue is written as text, in Jinja; nothing if it is not known
    remarks    sentences about what it has and we do not, and about what it lacks
    """

    settings: Mapping[str, Any]
    program: Program
    params: Params
    tokenizer: Tokenizer | None
    facts: Mapping[str, Any]
    ids: Mapping[str, Any]
    folder: pathlib.Path | None = None
    chat_template: str = ""
    remarks: tuple[str, ...] = ()
    trained: Params = dataclasses.field(default_factory=dict)
    base: str = ""

    @property
    def vocab_size(self) -> int:
        """V, the number of ids that it knows."""
        return self.program.model.vocab_size

    @property
    def opened_as(self) -> str:
        """The class of transformers that gives its logits."""
        return choose_architecture(self.settings).opened_as

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """logits_BTV, float32, of rows of tokens that are a text each, and its source if the model reads one."""
        model, shape = self.program.model, tokens_BT.shape
        segments_BT = np.ones(shape, np.int32)
        positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32)[None], shape)
        weights_BT, index_B = np.ones(shape, np.float32), np.arange(shape[0], dtype=np.int32)
        batch = Batch(tokens_BT, tokens_BT, weights_BT, segments_BT, positions_BT, index_B)
        if isinstance(model, ReadsSource):
            source = {"tokens": tokens_BT, "segments": segments_BT, "positions": positions_BT}
            batch = dataclasses.replace(batch, **{f"source_{name}": array for name, array in source.items()})
        logits = jax.jit(
            lambda params: head_logits(model.apply(params, batch).hidden_BTD, model.head(params))
        )
        return np.asarray(logits(self.params), np.float32)


def load_foreign(kind: str, path: pathlib.Path, tokenizer: pathlib.Path | None = None) -> Model:
    """The model at `path`, of the `kind` of a key of `OPEN`. `tokenizer` is used instead of the one beside it."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a model")
    source = OPEN[kind](path)
    program = _program(imported_config(source.settings), source.vocab_size)
    abstract = program.params_shape
    places = source.places(abstract)
    # Before anything is read: all tensors are there, and of the right shape.
    remarks = source.remarks(source.match(places))
    found = tokenizer or source.tokenizer
    text = None if found is None else tokenizer_for(found, source.vocab_size)
    if text is not None:
        source.check_start(text.bos_id)
    digests: dict[str, str] = {}
    params = source.read(abstract, digests.__setitem__)
    facts = certificate.side(
        kind, path, architecture=source.architecture.name, keys_not_read=list(source.not_read)
    )
    facts |= certificate.source_tensors(source, places, digests)
    folder, ids = (path, source.ids) if kind == "hf" else (None, _ids(text))
    settings = settings_of(program.config)
    template = "" if text is None else text.chat_template
    return Model(settings, program, params, text, facts, ids, folder, template, tuple(remarks))


def load_run(workdir: pathlib.Path, checkpoint: str = "latest") -> Model:
    """The model of a checkpoint of the run in `workdir`."""
    saved = standing.config_of(workdir, warn)
    if saved is None:
        raise UserError(f"{workdir} holds no run; give the workdir of one")
    tokenizer = own_tokenizer(workdir)
    trained = complete_config(saved, workdir)
    family = choose(FAMILIES, "model.family", trained["model"]["family"])
    if isinstance(TASKS[trained["task"]["name"]], AddsParameters):
        raise UserError(
            f"{workdir} holds a model of task.name={trained['task']['name']!r}, whose head for labels is not converted "
            "yet; give a run of another task"
        )
    names = ("model", *family.sections)
    settings = {f"{section}.{key}": value for section in names for key, value in trained[section].items()}
    config = imported_config({**settings, "data.seq_len": trained["data"]["seq_len"]})
    if trained["task"]["name"] != config.task.name:
        kind = "a model that writes after a source" if family.reads_source else "a language model"
        warn(
            f"note: what is written is {kind}; that {workdir} was trained with task.name="
            f"{trained['task']['name']!r}, and how its texts are marked, is not written with it"
        )
    # An optimizer that averages keeps a part of the parameters in its state, and frozen ones lie apart. Nothing else of
    # the run matters here.
    trained_with = read_optimizer(saved, workdir) | read_tuning(saved, workdir, config.train)
    config = dataclasses.replace(config, **trained_with)
    program = _program(config, tokenizer.vocab_size)
    update, own, frozen = load_parts(program, workdir, checkpoint)
    params, base = program.whole(own, frozen), trained["checkpoint"]["init_from"]
    facts = certificate.side("llmjax", workdir, update=update)
    settings, ids, template = settings_of(program.config), _ids(tokenizer), tokenizer.chat_template
    return Model(settings, program, params, tokenizer, facts, ids, None, template, trained=own, base=base)


def _ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids of the special tokens, by their names in config.json."""
    if tokenizer is None:
        return dict.fromkeys(TOKEN_IDS)
    return {name: getattr(tokenizer, name.replace("token_", "")) for name in TOKEN_IDS}


def _program(config: Config, vocab_size: int) -> Program:
    config, derived = resolve_config(config, 1)
    # Nothing is trained here, so that any words will do for a task that masks them.
    words = functools.partial(words_without_text, vocab_size)
    return make_program(config, derived, vocab_size, jax.devices()[:1], vocabulary=words)


def check_destination(path: pathlib.Path) -> None:
    """UserError where something lies at `path` already: a result never takes the place of anything."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; give a new folder")


def save_as_run(model: Model, workdir: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes a workdir from which `--mode=generate` and `checkpoint.init_from` work. UserError without a tokenizer."""
    if model.tokenizer is None:
        raise UserError(
            f"{model.facts['path']} has no tokenizer that is read here (tokenizer.model, tokenizer.json, vocab.json "
            "with merges.txt, vocab.txt, or tok*.bin of llama2.c); name one with --tokenizer"
        )
    config = imported_config(model.settings, str(workdir.absolute() / "tokenizer"))
    config, _ = resolve_config(config, 1)
    meta = {"config": config.to_dict(), "data_fingerprint": "none", "versions": {}} | Position().to_meta()
    with _new_folder(workdir) as folder:
        model.tokenizer.save(folder / "tokenizer")
        save_template(folder / "tokenizer", model.chat_template)
        write_json(folder / "config.json", config.to_dict())
        noted = standing.note_saved(folder, standing.CHECKPOINTS)
        with Checkpoints(folder / standing.CHECKPOINTS, config.checkpoint, on_saved=noted) as checkpoints:
            checkpoints.save(0, {"params": model.params}, meta)
        certificate.write(folder, {"from": model.facts, "to": _facts(model, "llmjax", workdir), **facts})


def save_as_hf(
    model: Model,
    folder: pathlib.Path,
    dtype: str,
    verify: Callable[[pathlib.Path], Mapping[str, Any]] = lambda _: {},
) -> None:
    """Writes a folder that `transformers` reads, with weights of the type `dtype`.

    `verify` is called with the folder when all but the certificate is in it, and its result goes into the certificate;
    if it raises, nothing is left behind. Raises UserError if transformers has no such model.
    """
    export = hf_folder.Export(model.settings, model.vocab_size, model.ids, dtype)
    export.check(model.params)
    places, digests = places_of(export.architecture, model.params), dict[str, str]()
    with _new_folder(folder) as unfinished:
        export.write(unfinished, model.params, digests.__setitem__)
        if model.folder is not None:
            copy_tokenizer_files(model.folder, unfinished)
        else:
            save_for_transformers(model.tokenizer, model.ids, model.chat_template, unfinished)
        to = _facts(model, "hf", folder) | {"architecture": export.architecture.name}
        to |= certificate.written_tensors(places, dict.fromkeys(places, dtype), digests)
        certificate.write(unfinished, {"from": model.facts, "to": to, **verify(unfinished)})


def save_as_gguf(
    model: Model,
    folder: pathlib.Path,
    dtype: str,
    verify: Callable[[pathlib.Path], Mapping[str, Any]] = lambda _: {},
) -> None:
    """Writes a folder with a GGUF file for llama.cpp, its matrices of the type `dtype`, and the certificate.

    `verify` is called with the folder, as in `save_as_hf`. Raises UserError if llama.cpp has no such model.
    """
    name = pathlib.Path(model.facts["path"]).name
    others = {"general.name": name, **facts_for_gguf(model.tokenizer, model.chat_template)}
    export = gguf_export.Export(model.settings, model.vocab_size, dtype, others)
    export.check(model.params)
    places, types, digests = export.places(model.params), export.types(model.params), dict[str, str]()
    with _new_folder(folder) as unfinished:
        export.write(unfinished, model.params, digests.__setitem__)
        to = _facts(model, "gguf", folder) | {"architecture": export.family}
        to |= certificate.written_tensors(places, types, digests)
        certificate.write(unfinished, {"from": model.facts, "to": to, **verify(unfinished)})


def save_as_peft(
    model: Model,
    folder: pathlib.Path,
    dtype: str,
    verify: Callable[[pathlib.Path], Mapping[str, Any]] = lambda _: {},
) -> None:
    """Writes a folder with the adapters of a run as the library `peft` reads them, float32, without their model.

    `verify` is called with the folder, as in `save_as_hf`. Raises UserError if transformers has no such model.
    """
    if dtype != "float32":
        raise UserError(f"--dtype={dtype} is not for adapters, which are written as float32; leave it out")
    base = pathlib.Path(model.base)
    named = str(base.absolute()) if model.base and hf_folder.is_model_folder(base) else ""
    with _new_folder(folder) as unfinished:
        save_adapters(model.program, model.trained, unfinished, named)
        to = _facts(model, "peft", folder)
        certificate.write(unfinished, {"from": model.facts, "to": to, **verify(unfinished)})


@contextlib.contextmanager
def _new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    check_destination(path)
    with new_folder(path, lambda folder: False) as unfinished:
        yield unfinished


def _facts(model: Model, kind: str, path: pathlib.Path) -> dict[str, Any]:
    tokenizer = "none" if model.tokenizer is None else model.tokenizer.fingerprint
    facts = certificate.model_facts(model.settings, model.vocab_size)
    return certificate.side(kind, path, **facts, tokenizer=tokenizer)
