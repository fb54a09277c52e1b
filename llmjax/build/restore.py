"""Restores the state of a run from its checkpoints, or makes a new one, with parameters of another run if asked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from llmjax.build.corpus import Corpus
from llmjax.build.corpus_record import describe_difference
from llmjax.build.model import added_entries, has_reference
from llmjax.build.program import Program
from llmjax.build.tuning.adapters import with_adapters
from llmjax.build.tuning.frozen import load_frozen, save_frozen
from llmjax.config.imported import imported_config
from llmjax.config.reading import complete_config, read_optimizer, read_task, read_tuning
from llmjax.config.resume import made_anew
from llmjax.config.schema import Config
from llmjax.convert.foreign import is_foreign, open_foreign
from llmjax.errors import UserError
from llmjax.models.reference import own as own_params
from llmjax.models.reference import with_reference
from llmjax.models.table import FAMILIES
from llmjax.ops.seeds import make_key
from llmjax.parallel import hosts
from llmjax.parallel.agreement import from_primary, together
from llmjax.terminal.lines import say, warn
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.checkpoint.config import CheckpointConfig
from llmjax.train.checkpoint.which import named_updates
from llmjax.train.loop.run_position import Position
from llmjax.train.update.state import TrainState
from llmjax.types import Params
from llmjax.workdir import standing
from llmjax.workdir.contents import saved_config
from llmjax.workdir.lock import Lock, wait_to_see

# How the folder of a stopped update is kept: the newest alone, for the one before it is of no use any more.
KEEP_NEWEST = CheckpointConfig(every=0, keep=1, keep_best=False)


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of `workdir` in all processes of a run.

    Gives a function that raises UserError where another run has taken the lock in spite of that.
    """
    with contextlib.ExitStack() as stack:
        lock = together(lambda: stack.enter_context(Lock(workdir, warn)) if hosts.is_primary() else None)
        token = from_primary(lock and lock.token)
        together(lambda: wait_to_see(workdir, token))
        yield lock.check if lock else lambda: None


def open_checkpoints(
    workdir: pathlib.Path,
    folder: str,
    config: CheckpointConfig,
    check_lock: Callable[[], None] = lambda: None,
) -> Checkpoints:
    """The checkpoints in a folder of `workdir`, for a run that trains there; `check_lock` precedes each save."""
    return Checkpoints(
        workdir / folder,
        config,
        check_meta=standing.check_meta,
        before_save=check_lock,
        on_saved=standing.note_saved(workdir, folder),
    )


def resume_or_init(
    program: Program, corpus: Corpus, checkpoints: Checkpoints, workdir: pathlib.Path
) -> tuple[TrainState, Position]:
    """The state and position from which a run goes on.

    They are those of the newest good checkpoint, or of an update that was stopped after it. Where nothing was saved
    they are new. Raises UserError where there were checkpoints and none of them is good, so that a run never begins
    again in silence.
    """
    with contextlib.ExitStack() as stack:
        sources = [checkpoints]
        for folder in standing.partial_folders(workdir):
            sources.append(stack.enter_context(open_checkpoints(workdir, folder, KEEP_NEWEST)))
        metas = {}
        for source in sources:
            if source.latest() is not None:
                with contextlib.suppress(
                    UserError
                ):  # where none is left: each that was damaged has been named
                    metas[source] = source.read_meta(source.verify())
        if not metas:
            together(lambda: standing.check_standing(workdir, warn))
            if standing.has_begun(workdir):
                warn(f"no checkpoint in {workdir} has shown a finite loss; the run begins again")
            params, begun_with = None, program.config.checkpoint.init_from
            if begun_with:
                update, params = initial_params(program, lambda sentence: say(f"note: {sentence}"))
                which = program.config.checkpoint.init_checkpoint
                mean = f"the mean ({which}) to " if which.startswith("average") else ""
                say(f"beginning with the parameters of {mean}update {update} of {begun_with}")
            if program.config.lora.init_from:
                say(f"beginning with the adapters in {program.config.lora.init_from}")
            state = begin_with(program, params)
            save_frozen(program, state, workdir)
            return state, Position()
        newest = max(metas, key=lambda source: metas[source]["cursor"])
        if different := describe_difference(workdir, metas[newest]["data_fingerprint"], corpus):
            raise UserError(
                f"{different}, so its data cursor means nothing here; restore them or use another --workdir"
            )
        if newest is checkpoints:
            return restore(program, checkpoints, workdir)
        position = Position.from_meta(metas[newest])
        position.check_partial_update(program.batch.micro_batch_size, program.engine.stops_within)
        stopped, _ = newest.restore(dataclasses.replace(program.abstract_state(), frozen={}))
        return dataclasses.replace(stopped, frozen=load_frozen(program, workdir, metas[newest])), position


def begin_with(program: Program, params: Params | None) -> TrainState:
    """A new state, with `params` if they are given, and with the adapters in lora.init_from if it names some."""
    state = program.init(params)
    return with_adapters(program, state) if program.config.lora.init_from else state


def untrained_params(
    program: Program, tell: Callable[[str], None] = lambda sentence: None
) -> tuple[int, Params]:
    """The update and the parameters with which a run would begin, see `initial_params`."""
    update, params = initial_params(program, tell)
    if program.config.lora.init_from:
        params = program.eval_params(begin_with(program, params))
    return update, params


def restore(program: Program, checkpoints: Checkpoints, workdir: pathlib.Path) -> tuple[TrainState, Position]:
    """The state of the latest checkpoint, ready to train on, and its position."""
    saved, meta = checkpoints.restore(program.abstract_saved())
    return program.resumed(saved, load_frozen(program, workdir, meta)), Position.from_meta(meta)


def initial_params(
    program: Program, tell: Callable[[str], None] = lambda sentence: None
) -> tuple[int, Params]:
    """The update and parameters of the checkpoint that checkpoint.init_from and checkpoint.init_checkpoint name.

    The update is 0 for a model of another program. Its tensors are read one at a time, into the layout of the mesh.
    What the task adds to a model, such as a head for classes, begins anew if the other model was not trained on the
    same task with the same labels. So do the layers of a head that the other model does not have (`Family.optional`).
    `tell` is called with a sentence about each, and about what the other model has and this one does not.
    """
    config = program.config
    source = pathlib.Path(config.checkpoint.init_from)
    if is_foreign(source):
        wanted, model = own_params(program.params_shape), open_foreign(source)
        absent = _absent(config, imported_config(model.settings).to_dict())
        added = (*absent.values(), *added_entries(config))
        known = {name: x for name, x in wanted.items() if name not in added}
        for remark in model.remarks(model.match(model.places(known)), not added_entries(config)):
            tell(remark)
        return 0, _with_added(program, model.read(known), added, tell)
    saved = saved_config(source)
    if saved is None:
        raise UserError(
            f"checkpoint.init_from={config.checkpoint.init_from!r} has lost its config.json; restore it"
        )
    trained_with = read_optimizer(saved, source) | read_tuning(saved, source, config.train)
    if trained_with["lora"].rank and config.lora.init_from:
        tell(
            f"checkpoint.init_from={config.checkpoint.init_from!r} has adapters of its own, which are in its matrices "
            "now, and those in lora.init_from are added to that; if they are the same, give the model without them"
        )
    there = dataclasses.replace(config, **read_task(saved, source))
    absent = _absent(config, complete_config(saved, source))
    for key in absent:
        section, name = key.split(".")
        off = dataclasses.replace(trained_with.get(section, getattr(config, section)), **{name: False})
        trained_with[section] = off
    # Both are empty for most tasks.
    ours, theirs = added_entries(config), added_entries(there)
    if ((ours or theirs) and not has_same_head(config, there)) or has_reference(config) != has_reference(
        there
    ):
        trained_with |= read_task(saved, source)
    # An optimizer that averages keeps a part of the parameters to evaluate with in its state.
    loader = program
    if any(section != getattr(config, name) for name, section in trained_with.items()):
        loader = program.changed(dataclasses.replace(config, **trained_with), program.derived)
    which = config.checkpoint.init_checkpoint
    update, params = load_params(loader, source, which, "checkpoint.init_checkpoint")
    # What the other run began with is of no use to this one.
    params, added = own_params(params), tuple(absent.values())
    if not has_same_head(config, there):
        params = {name: x for name, x in params.items() if name not in theirs}
        added += ours
    return update, _with_added(program, params, added, tell)


def has_same_head(config: Config, other: Config) -> bool:
    """Whether what the tasks of two configs add to a model means the same."""
    name = config.task.name
    labels = [getattr(each.tasks.get(name), "labels", ()) for each in (config, other)]
    return name == other.task.name and labels[0] == labels[1]


def _absent(config: Config, there: Mapping[str, Any]) -> dict[str, str]:
    """The keys and entries of a head that a run of `config` has and the run of the config `there` has not."""
    return made_anew(there, config.to_dict(), FAMILIES[config.model.family])


def _with_added(
    program: Program, params: Params, added: tuple[str, ...], tell: Callable[[str], None]
) -> Params:
    """`params` with newly initialised parameters for the entries `added`, and with what the task remembers of all."""
    if added:
        params |= _made_anew(program, added, tell)
    if not has_reference(program.config):
        return params
    shardings = jax.tree.map(lambda x: x.sharding, program.params_shape)
    return jax.jit(with_reference, out_shardings=shardings)(params)


def _made_anew(program: Program, added: tuple[str, ...], tell: Callable[[str], None]) -> Params:
    """Newly initialised parameters for the entries `added`."""
    source, name = program.config.checkpoint.init_from, program.config.task.name
    optional = FAMILIES[program.config.model.family].optional
    keys = {entry: f"{key}=True" for key, entry in optional.items()}
    why = dict.fromkeys(keys.get(entry, f"task.name={name!r}") for entry in added)
    asked = " and ".join(why) + (" add" if len(why) > 1 else " adds")
    begin = "begin" if len(added) > 1 else "begins"
    tell(
        f"checkpoint.init_from={source!r} has all parameters but {' and '.join(added)}, which {asked} "
        f"and which {begin} anew"
    )
    wanted = program.params_shape
    shardings = {name: jax.tree.map(lambda x: x.sharding, wanted[name]) for name in added}
    rng = jax.random.split(make_key(program.config.seed))[0]

    def init(rng: jax.Array) -> Params:
        whole = program.model.init(rng)
        return {name: whole[name] for name in added}

    return jax.jit(init, out_shardings=shardings)(rng)


def load_params(
    program: Program, workdir: pathlib.Path, checkpoint: str, key: str = "--checkpoint"
) -> tuple[int, Params]:
    """The update and the parameters of the model in a checkpoint, for evaluation and generation.

    Of several, the parameters are averaged (as in Vaswani et al. 2017), and the update is that of the newest.

    checkpoint  latest (the newest good one), best, the number of an update, or average:N of the newest N
    key         the flag or config key that named it, for errors
    """
    with _opened(program, workdir) as checkpoints:
        updates = named_updates(checkpoints, key, checkpoint)
        update, *parts = _load_parts(program, workdir, checkpoints, updates[0])
        mean = program.whole(*parts)
        for number, other in enumerate(updates[1:], 2):
            update, *parts = _load_parts(program, workdir, checkpoints, other)
            mean = _add_to_mean(mean, program.whole(*parts), 1 / number)
        return update, mean


@functools.partial(jax.jit, donate_argnums=0)
def _add_to_mean(mean: Params, params: Params, share: float) -> Params:
    return jax.tree.map(lambda m, x: m + (x - m) * share, mean, params)


def load_parts(
    program: Program, workdir: pathlib.Path, checkpoint: str, key: str = "--checkpoint"
) -> tuple[int, Params, Params]:
    """The update of one checkpoint, the parameters that trained, as they are evaluated, and the frozen ones."""
    with _opened(program, workdir) as checkpoints:
        updates = named_updates(checkpoints, key, checkpoint)
        if len(updates) > 1:
            raise UserError(
                f"{key}={checkpoint} is an average of several checkpoints, which is not converted; give one, or let a "
                "run begin with the average by checkpoint.init_checkpoint and convert that run"
            )
        return _load_parts(program, workdir, checkpoints, updates[0])


@contextlib.contextmanager
def _opened(program: Program, workdir: pathlib.Path) -> Iterator[Checkpoints]:
    """The checkpoints of a run, to be read."""
    folder, config = workdir / "checkpoints", program.config.checkpoint
    if not folder.is_dir():
        raise UserError(f"{workdir} holds no checkpoints; train there first, or give another --workdir")
    with Checkpoints(folder, config, read_only=True, check_meta=standing.check_meta) as checkpoints:
        yield checkpoints


def _load_parts(
    program: Program, workdir: pathlib.Path, checkpoints: Checkpoints, update: int | None
) -> tuple[int, Params, Params]:
    """The result of `load_parts` for the checkpoint of `update`, None for the latest."""
    if program.averages:
        saved, meta = checkpoints.restore(program.abstract_saved(), update)
        state = program.resumed(saved, load_frozen(program, workdir, meta))
        return meta["update"], program.engine.eval_params(state.opt_state, state.params), state.frozen
    params, meta = checkpoints.restore_params(program.abstract_saved().params, update)
    return meta["update"], params, load_frozen(program, workdir, meta)
