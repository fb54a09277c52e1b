"""The checkpoints of a run: saved while training goes on, verified before they are used, deleted when not needed.

A checkpoint holds the state (parameters, optimizer, random key, update count), a dictionary `meta` (data cursor,
tokens, seconds, resolved config, versions, data fingerprint), and digests of both. An array is stored under the path
of its leaf, such as `params/embed/table`. A checkpoint therefore depends on names and not on Python classes, and can be
restored in part and onto any mesh.

A save is asynchronous. `save` returns when the arrays are copied from the devices, so the state may be donated
afterwards; a save for which nobody waits at exit is lost. A process that dies while it saves or deletes leaves only
whole checkpoints, because a folder gets its name when everything in it is written. Damage that a disk does later is
found before the checkpoint is used: the damaged one is set aside, and the newest good one is used instead.

What is found out about a checkpoint after its save, such as its held-out loss, is added to its meta by `amend`.
`retention.py` decides by these facts which checkpoints are kept.
"""

from __future__ import annotations

import math
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from llmjax.errors import UserError, reason_of
from llmjax.parallel import hosts
from llmjax.parallel.agreement import from_primary, on_primary, together
from llmjax.terminal.lines import warn
from llmjax.terminal.stages import working
from llmjax.train.checkpoint import shelf
from llmjax.train.checkpoint.config import CheckpointConfig
from llmjax.train.checkpoint.digests import Damaged
from llmjax.train.checkpoint.retention import Facts, best_of, kept, read_amended, write_amended
from llmjax.train.checkpoint.verification import find_damage, sort_checkpoints
from llmjax.types import Params

Value = TypeVar("Value")


def _orbax() -> types.ModuleType:
    """The module `orbax_files`, imported late: it takes half a second, in which a run can compile its step."""
    from llmjax.train.checkpoint import orbax_files

    return orbax_files


class Checkpoints:
    """The checkpoints in one directory. A context manager, which on leaving waits until everything is written.

    All processes of a run make one and call the same methods in the same order.

    read_only    for a process that does not train. It writes, deletes and renames nothing, so it may look into the
                 directory of a run that is under way
    check_meta   raises ValueError where a meta is not what the run needs; the checkpoint then counts as damaged
    tell         receives a sentence about each damaged checkpoint: which, why, and what became of it
    before_save  raises where the directory must no longer be written to
    on_saved     (update, meta) -> None. It is called on the first process, in the thread of the save, when a checkpoint
                 is complete except for its name. It is called again with the newest update, or None, when checkpoints
                 were given up
    """

    def __init__(
        self,
        directory: str | Path,
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        check_meta: shelf.CheckMeta = lambda meta: None,
        tell: Callable[[str], None] = warn,
        before_save: Callable[[], None] = lambda: None,
        on_saved: Callable[[int | None, dict], None] = lambda update, meta: None,
    ):
        if "://" in str(directory):
            raise UserError(
                f"{directory} is no path of this machine; mount the bucket and give the path there"
            )
        self.config = config or CheckpointConfig()
        self.directory = os.path.abspath(directory)
        _orbax().be_quiet()
        self._folder, self._read_only = Path(self.directory), read_only
        self._check_meta, self._tell = check_meta, tell
        self._before_save, self._on_saved = before_save, on_saved
        self._facts: dict[int, Facts] = {}
        self._saved_here: set[int] = set()
        # Amended values of checkpoints that are still being written.
        self._unwritten: dict[int, dict] = {}
        self._good: list[int] = []
        self._damaged: dict[int, str] = {}
        self._verified: set[int] = set()
        # Nothing is deleted before one checkpoint is known to be good.
        self._has_good = False
        self._saving: tuple[int, dict] | None = None
        self._manager: Any = None
        self._sweep()
        self._look()
        if not read_only:
            self._manager = _orbax().make_manager(self.directory, self.config, self._facts, self._is_complete)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        update: int,
        state: Any,
        meta: dict,
        *,
        rank: float | None = None,
        spare: bool = False,
    ) -> bool:
        """Starts to write `state` and `meta` (JSON) as the checkpoint of `update`; returns False if there is one.

        rank   orders the checkpoints: the lowest is the best, and one without a rank is never the best
        spare  the checkpoint is kept only while it is the newest or the best, until `amend` says otherwise

        Raises ValueError where a newer checkpoint exists, and RuntimeError where orbax does not save.
        """
        self.wait()
        # Parameters known to give no finite loss are worth nothing: these replace them.
        if update in self.updates() and self._finite_loss(update) is False:
            self._delete(update)
        if update in self.updates():
            return False
        newest = self.latest()
        if newest is not None and update < newest:
            raise ValueError(f"update {update} is older than checkpoint {newest} in {self.directory}")
        together(self._before_save)
        rank = rank if rank is not None and math.isfinite(rank) else None
        meta = {**meta, "rank": rank} | ({"spare": True} if spare else {})
        self._facts[update] = Facts.of(meta)
        self._saved_here.add(update)
        self._has_good = True
        self._saving = update, meta
        # A read-only directory has no manager, and is never saved to.
        assert self._manager is not None
        if not _orbax().start_saving(self._manager, update, state, meta):
            raise RuntimeError(f"the checkpoint of update {update} was not saved in {self.directory}")
        return True

    def restore(self, abstract_state: Any, update: int | None = None) -> tuple[Any, dict]:
        """The state and meta of `update`, or of the newest good checkpoint, laid out as `abstract_state` says.

        `abstract_state` is the state with `jax.ShapeDtypeStruct` (shape, dtype, sharding) for leaves. Raises
        UserError where there is no such checkpoint or only damaged ones, and where a leaf is missing, left over,
        or of another shape or dtype.
        """
        return self._read(update, lambda found: self._read_state(found, abstract_state))

    def restore_params(self, abstract_params: Params, update: int | None = None) -> tuple[Params, dict]:
        """The parameters and meta, for evaluation and generation: the optimizer's state is not read at all."""
        wanted = {"params": abstract_params}
        state, meta = self._read(update, lambda found: self._read_state(found, wanted, only=("params",)))
        return state["params"], meta

    def read_meta(self, update: int | None = None) -> dict:
        """The meta of `update`, or of the latest checkpoint, with everything that was amended since the save."""
        update = self._existing(update)
        try:
            return self._meta(update)
        except Damaged as why:
            raise UserError(
                f"the checkpoint of update {update} in {self.directory} is damaged ({why})"
            ) from None

    def amend(self, update: int, **values: Any) -> None:
        """Adds `values`, which JSON can hold, to the meta of a checkpoint; does nothing where there is no checkpoint.

        They are written at once, or, while the checkpoint itself is still being written, by the next `wait` or `close`.
        """
        if update not in self.updates():
            return
        self._facts[update] = self._facts.get(update, Facts()).amended(values)
        self._unwritten[update] = self._unwritten.get(update, {}) | values
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self._write_amended()

    def verify(self, update: int | None = None) -> int:
        """Compares the files of a checkpoint with their digests; returns its update.

        Without `update` it tries the newest first, sets each damaged one aside, and goes on with the one before. Raises
        UserError where `update` is damaged, or where no good checkpoint is left.
        """
        self.wait()
        while True:
            found = on_primary(lambda: self._existing(update))
            if found in self._verified or not (why := self._damage(found)):
                self._verified.add(found)
                self._has_good = self._has_good or update is None
                return found
            self._give_up(found, why, update)

    def updates(self) -> list[int]:
        """The updates that have a checkpoint, ascending. The one being written is among them."""
        return list(self._good) if self._manager is None else sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The update of the newest checkpoint that is not known to give a loss that is not finite, or None."""
        return max(
            (update for update in self.updates() if self._finite_loss(update) is not False), default=None
        )

    def latest_good(self) -> int | None:
        """The newest update whose parameters have given a finite loss since they were saved, or None."""
        return max((update for update in self.updates() if self._finite_loss(update) is True), default=None)

    def best(self) -> int | None:
        """The update with the lowest rank, or None where no checkpoint has a rank."""
        return best_of(self.updates(), self._facts)

    def would_be_best(self, rank: float) -> bool:
        """Whether a checkpoint of this rank would be kept as the new best."""
        best = self.best()
        least = None if best is None else self._facts[best].rank
        return self.config.keep_best and math.isfinite(rank) and (least is None or rank < least)

    def give_up_after(self, update: int | None) -> None:
        """Gives up the checkpoints after `update` (None: all of them), because they give no finite loss.

        Checkpoints that this process saved are deleted. Older ones stay on disk, but are never the latest or the best
        again.
        """
        self.wait()
        for later in self.updates():
            if (update is None or later > update) and self._finite_loss(later) is not True:
                if later in self._saved_here:
                    self._delete(later)
                else:
                    self.amend(later, finite_loss=False)
        self._sweep()
        if hosts.is_primary():
            left = max(self.updates(), default=None)
            self._on_saved(left, {"update": left})

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises whatever went wrong in the writing."""
        if self._manager is not None:
            if self._manager.is_saving_in_progress():
                with working("writing the checkpoint"):
                    self._manager.wait_until_finished()
            # Also where nothing is in progress, for it raises what went wrong.
            self._manager.wait_until_finished()
            self._write_amended()
            # Only now: a checkpoint is not deleted while its successor may still fail to be written.
            spare = set(self.updates()) - kept(self.updates(), self._facts, self.config)
            for update in spare if self._has_good else ():
                self._delete(update)
        self._sweep()

    def close(self) -> None:
        """Waits as `wait` does, and closes orbax's manager."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
        self._sweep()

    def _sweep(self) -> None:
        """Removes checkpoints that were moved to the folder of deleted ones."""
        if not self._read_only and hosts.is_primary():
            shutil.rmtree(os.path.join(self.directory, _orbax().DELETED), ignore_errors=True)

    def _is_complete(self) -> None:
        """Called by orbax, in the thread of a save, just before the checkpoint gets its name."""
        if self._saving is not None:
            self._on_saved(*self._saving)

    def _look(self) -> None:
        """Lists the checkpoints of the directory and sets visibly damaged ones aside. Contents are compared later."""

        def sort():
            return sort_checkpoints(self._folder, self._check_meta, read_only=self._read_only)

        good, damaged = sort() if self._read_only else on_primary(sort)
        self._good = [update for update, _ in good]
        self._facts.update(
            {update: Facts(**facts).amended(self._unwritten.get(update, {})) for update, facts in good}
        )
        for update, why, name in damaged:
            if update not in self._damaged:
                self._damaged[update] = why
                self._tell(f"{self._describe(update, name)}; it is not used")

    def _meta(self, update: int) -> dict:
        meta = shelf.read_meta(self._folder / str(update))
        return meta | read_amended(self.directory, update) | self._unwritten.get(update, {})

    def _damage(self, update: int) -> str:
        return find_damage(self._folder / str(update), self._check_meta, self._tell)

    def _give_up(self, update: int, why: str, asked: int | None) -> None:
        """Sets a damaged checkpoint aside and says which one is used instead. UserError where `asked` names it."""
        path = self._folder / str(update)
        # The run that trains here may have deleted it in the meantime.
        if from_primary(not path.exists()):
            self._look()
            return
        self._damaged[update] = why
        self._good = [each for each in self._good if each != update]
        self._facts.pop(update, None)
        if asked is not None:
            raise UserError(f"{self._describe(update)}; choose {self._others() or 'another workdir'}")
        name = ""
        if self._manager is not None:
            name = on_primary(lambda: shelf.move_aside(self._folder, update))
            self._manager.reload()
        newest = self.latest()
        instead = "no other is left" if newest is None else f"the one of update {newest} takes its place"
        self._tell(f"{self._describe(update, name)}; {instead}")

    def _describe(self, update: int, name: str = "") -> str:
        text = f"the checkpoint of update {update} in {self.directory} is damaged ({self._damaged[update]})"
        return f"{text} and was set aside as {name}" if name else text

    def _others(self) -> str:
        return ", ".join(map(str, self.updates()))

    def _existing(self, update: int | None) -> int:
        """`update`, or the latest one where it is None. UserError where there is no such checkpoint."""
        found = self.updates()
        if update in self._damaged and update not in found:
            raise UserError(f"{self._describe(update)}; choose {self._others() or 'another workdir'}")
        if not found and (aside := shelf.set_aside(self._folder) or [*map(str, self._damaged)]):
            raise UserError(
                f"no checkpoint in {self.directory} is good: {', '.join(aside)} "
                f"{'is' if len(aside) == 1 else 'are'} damaged; restore one from a copy, or use another --workdir"
            )
        if not found:
            raise UserError(f"there is no checkpoint in {self.directory}; train there first")
        if update is None and self._facts:
            update = self.latest()
            if update is None:
                text = ", ".join(map(str, found))
                raise UserError(
                    f"no checkpoint in {self.directory} has shown a finite loss; train again with a lower "
                    f"optimizer.learning_rate, or name one of {text}"
                )
        if update not in found:
            text = ", ".join(map(str, found))
            raise UserError(
                f"there is no checkpoint of update {update} in {self.directory}; choose among {text}"
            )
        return update

    def _finite_loss(self, update: int) -> bool | None:
        """Whether the parameters have given a finite loss; None where no loss was seen."""
        return self._facts[update].finite_loss if update in self._facts else None

    def _delete(self, update: int) -> None:
        # A read-only directory has no manager, and nothing is deleted from it.
        assert self._manager is not None
        self._manager.delete(update)
        self._facts.pop(update, None)

    def _write_amended(self) -> None:
        """Writes amended values to disk. Not to be called while a checkpoint is being written."""
        unwritten, self._unwritten = self._unwritten, {}
        if self._read_only or not hosts.is_primary():
            return
        for update, values in unwritten.items():
            if update in self.updates():
                write_amended(self.directory, update, values)

    def _read(self, asked: int | None, read: Callable[[int], Value]) -> tuple[Value, dict]:
        """`read(update)` and the meta, for the checkpoint `asked` or, where it is None, the newest good one."""
        while True:
            update = self.verify(asked)
            # It is verified again before the next reading, for the disk may damage it in between.
            self._verified.discard(update)
            path, has_digests = self._folder / str(update), False
            try:
                has_digests = shelf.has_digests(path)
                meta = self._meta(update)
                return read(update), meta
            except (UserError, jax.errors.JaxRuntimeError, MemoryError):
                raise
            except Exception as error:
                # Its digests are right, so the files are as they were written: the fault lies elsewhere.
                if path.exists() and has_digests:
                    raise
                self._give_up(update, f"{type(error).__name__}: {reason_of(error)[:200]}", asked)

    def _read_state(self, update: int, abstract: Any, only: tuple[str, ...] = ()) -> Any:
        folder = self._folder / str(update) / shelf.STATE
        where = f"the checkpoint of update {update} in {self.directory}"
        return _orbax().read_state(folder, abstract, where, only)
