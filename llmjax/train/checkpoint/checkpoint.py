"""Checkpoints: the state, and beside it what a run needs to go on as if it had never stopped.

A checkpoint is the state (parameters, optimizer, random key, update count) plus a `meta` dictionary (data
cursor, tokens, seconds, resolved config, versions, data fingerprint) and digests of both. Arrays are stored
under the path of their leaf, `params/embed/table`, so that a checkpoint depends on names and not on Python
classes, and can be restored in part and onto any mesh. Saves are asynchronous: the device is read before
`save` returns, so donating the state afterwards is safe, but a save that nobody waits for at exit is lost. A
process that dies in a save, or while it deletes an old checkpoint, leaves only whole ones: the folder gets its
name when all of it is written, digests included. What a disk damages later is noticed before it is used: the
newest good checkpoint serves instead, and the damaged one is set aside. This file alone knows orbax.

What is found out about a checkpoint after it was saved, such as its held-out loss, is amended to its meta: see
`retention.py`, which also says what is kept.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import absl.logging
import jax
import orbax.checkpoint as ocp

from llmjax.errors import UserError
from llmjax.escapes import complain
from llmjax.parallel import hosts
from llmjax.parallel.agreement import from_primary, gather, on_primary, together
from llmjax.ranges import COUNT, Range, Unset, check_ranges
from llmjax.train.checkpoint import digests, leaves, shelf
from llmjax.train.checkpoint.digests import Damaged
from llmjax.train.checkpoint.retention import Facts, best_of, kept, read_amended, write_amended
from llmjax.train.checkpoint.which import check_name
from llmjax.types import Params

DELETED = "deleted"  # a folder beside the checkpoints
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, in updates, what to keep, and whose parameters to begin with.

    every            updates between checkpoints
    keep, keep_best  the newest `keep` and, if wanted, the best
    init_from        workdir of the run with whose parameters this one begins; "" = fresh ones
    init_checkpoint  which of its checkpoints: latest, best or the number of an update
    """

    every: Annotated[int, Range(1, COUNT, "only at the end")] = 100
    keep: Annotated[int, Range(1, COUNT)] = 2
    keep_best: bool = True
    init_from: Annotated[str, Unset("")] = ""
    init_checkpoint: Annotated[str, Unset("latest")] = "latest"

    def __post_init__(self):
        check_ranges("checkpoint", self)
        check_name("checkpoint.init_checkpoint", self.init_checkpoint)
        if self.init_checkpoint != "latest" and not self.init_from:
            raise UserError(
                f"checkpoint.init_checkpoint={self.init_checkpoint!r} has no meaning without checkpoint.init_from; "
                "name a workdir there, or leave it at latest"
            )


def warn(text: str) -> None:
    """Says on stderr, once for all processes, what is wrong although the run goes on."""
    if hosts.is_primary():
        complain(text)


class Checkpoints:
    """The checkpoints in one directory. A context manager: leaving it waits for what is being written.

    `read_only` is for a process that does not train: it writes nothing, cleans nothing up and sets nothing aside,
    and so may look into the directory of a run that is under way.

    check_meta  raises ValueError where a meta is not what the run needs; the checkpoint then counts as damaged
    tell        says which checkpoint is damaged, why, and what became of it
    before_save raises where the directory must no longer be written to
    on_saved    (update, meta) -> None; called on the first process, in a thread, when a checkpoint is complete but
                for its name; and again of the newest, or None, when later ones were given up
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
        if absl.logging.get_verbosity() > absl.logging.WARNING:  # at INFO a save prints some seventy lines
            absl.logging.set_verbosity(absl.logging.WARNING)
        self._folder, self._read_only = Path(self.directory), read_only
        self._check_meta, self._tell = check_meta, tell
        self._before_save, self._on_saved = before_save, on_saved
        self._facts: dict[int, Facts] = {}
        self._saved_here: set[int] = set()
        self._unwritten: dict[int, dict] = {}  # what is to be amended once the checkpoint is written
        self._good: list[int] = []
        self._damaged: dict[int, str] = {}
        self._verified: set[int] = set()
        self._has_good = False  # whether a good one is known; before that none is deleted
        self._saving: tuple[int, dict] | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._sweep()
        self._look()
        if not read_only:
            self._manager = self._make_manager()

    def _make_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Preserve(self.config, self._facts),
            cleanup_tmp_directories=True,
            # Deleted where it is, a checkpoint would for a moment be one that lacks files.
            todelete_subdir=DELETED,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._is_complete),
        )
        handlers = {"state": _DigestedTree(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

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
        """Starts writing `state` and `meta` (JSON) as the checkpoint of `update`; False if it exists.

        `rank` orders it among the others, the lowest being the best; a checkpoint without one is never the best. A
        `spare` one is kept while it is the newest or the best, until `amend` says that it is no longer spare.
        """
        self.wait()
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
        items = ocp.args.Composite(
            state=_DigestedTreeSave(leaves.to_tree(state)), meta=ocp.args.JsonSave(shelf.with_digest(meta))
        )
        assert self._manager is not None  # what is read only is not written to
        if not self._manager.save(update, args=items, force=True):
            raise RuntimeError(f"the checkpoint of update {update} was not saved in {self.directory}")
        return True

    def restore(self, abstract_state: Any, update: int | None = None) -> tuple[Any, dict]:
        """The state and meta of `update` (default: the newest good one), laid out as `abstract_state` says.

        `abstract_state` is the state with `jax.ShapeDtypeStruct` (shape, dtype, sharding) for leaves. Raises
        UserError where there is no such checkpoint or only damaged ones, and where a leaf is missing, left over,
        or of another shape or dtype.
        """
        return self._read(update, lambda found: self._restore(found, abstract_state))

    def restore_params(self, abstract_params: Params, update: int | None = None) -> tuple[Params, dict]:
        """The parameters alone, for evaluation and generation: nothing of the optimizer goes to the devices."""
        wanted = {"params": abstract_params}
        state, meta = self._read(update, lambda found: self._restore(found, wanted, only=("params",)))
        return state["params"], meta

    def read_meta(self, update: int | None = None) -> dict:
        """What was saved beside the arrays of `update` (default: the latest), and what was amended since."""
        update = self._existing(update)
        try:
            return self._meta(update)
        except Damaged as why:
            raise UserError(
                f"the checkpoint of update {update} in {self.directory} is damaged ({why})"
            ) from None

    def amend(self, update: int, **values: Any) -> None:
        """Adds `values`, which JSON holds, to the meta of a checkpoint; nothing happens where there is none.

        They are on disk at once where the checkpoint is, and otherwise when the next `wait` or `close` returns.
        """
        if update not in self.updates():
            return
        self._facts[update] = self._facts.get(update, Facts()).amended(values)
        self._unwritten[update] = self._unwritten.get(update, {}) | values
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self._write_amended()

    def verify(self, update: int | None = None) -> int:
        """`update`, or without one the newest, once its files were found to be what was written.

        A damaged checkpoint is set aside, and the one before it takes its place; where `update` names it, or
        nothing is left, UserError.
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
        """The updates that have a checkpoint, ascending, with the one being written."""
        return list(self._good) if self._manager is None else sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest checkpoint's update, or None; those that are known to give no finite loss do not count."""
        return max(
            (update for update in self.updates() if self._finite_loss(update) is not False), default=None
        )

    def latest_good(self) -> int | None:
        """The newest update with whose parameters a finite loss has been seen since, or None."""
        return max((update for update in self.updates() if self._finite_loss(update) is True), default=None)

    def best(self) -> int | None:
        """The update with the lowest rank of those that were evaluated, or None."""
        return best_of(self.updates(), self._facts)

    def would_be_best(self, rank: float) -> bool:
        """Whether a checkpoint of this rank would be the new best, and is to be kept as such."""
        best = self.best()
        least = None if best is None else self._facts[best].rank
        return self.config.keep_best and math.isfinite(rank) and (least is None or rank < least)

    def give_up_after(self, update: int | None) -> None:
        """Gives up the checkpoints after `update` (None: all of them), which give no finite loss.

        Those that were saved here are deleted; others stay, but are never the latest or the best again.
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
        """Returns when nothing is being written any more; raises what went wrong in writing."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._write_amended()
            spare = set(self.updates()) - kept(self.updates(), self._facts, self.config)
            for update in spare if self._has_good else ():
                self._delete(update)
        self._sweep()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
        self._sweep()

    def _sweep(self) -> None:
        """Removes what was put aside to be deleted."""
        if not self._read_only and hosts.is_primary():
            shutil.rmtree(os.path.join(self.directory, DELETED), ignore_errors=True)

    def _is_complete(self) -> None:
        """Told by orbax, in the thread of a save, just before the checkpoint gets its name."""
        if self._saving is not None:
            self._on_saved(*self._saving)

    def _look(self) -> None:
        """Finds out what is there. What is visibly damaged is set aside here; contents are compared when read."""
        good, damaged = self._sort() if self._read_only else on_primary(self._sort)
        self._good = [update for update, _ in good]
        self._facts.update({update: Facts(**facts) for update, facts in good})
        for update, why, name in damaged:
            if update not in self._damaged:
                self._damaged[update] = why
                self._tell(f"{self._describe(update, name)}; it is not used")

    def _sort(self) -> tuple[list[tuple[int, dict]], list[tuple[int, str, str]]]:
        """(update, facts) of what looks whole; (update, what is wrong, its new name) of what does not."""
        good, damaged = [], []
        for update in shelf.numbers(self._folder):
            path = self._folder / str(update)
            try:
                shelf.check(path, self._check_meta, contents=False)
                good.append((update, dataclasses.asdict(Facts.of(self._meta(update)))))
            except Damaged as why:
                if not path.exists():
                    continue  # deleted meanwhile by the run that trains here
                name = "" if self._read_only else shelf.move_aside(self._folder, update)
                damaged.append((update, str(why), name))
        return good, damaged

    def _meta(self, update: int) -> dict:
        meta = shelf.read_meta(self._folder / str(update))
        return meta | read_amended(self.directory, update) | self._unwritten.get(update, {})

    def _damage(self, update: int) -> str:
        """What is wrong with the contents of a checkpoint, or nothing; the processes share the reading."""
        path, part, parts = self._folder / str(update), jax.process_index(), jax.process_count()
        why, known = "", True
        try:
            shelf.check(path, self._check_meta, part=part, parts=parts)
            known = shelf.has_digests(path)
        except Damaged as found:
            why = str(found)
        why = next(filter(None, gather(why)), "")
        if not why and not known:
            self._tell(
                f"the checkpoint of update {update} in {self.directory} has no digests (an older version wrote it), "
                "so damage in it may go unnoticed"
            )
        return why

    def _give_up(self, update: int, why: str, asked: int | None) -> None:
        """Goes on without a damaged checkpoint; UserError where `asked` names it."""
        path = self._folder / str(update)
        if from_primary(not path.exists()):  # deleted meanwhile by the run that trains here
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
        return self._facts[update].finite_loss if update in self._facts else None

    def _delete(self, update: int) -> None:
        assert self._manager is not None  # what is read only is not written to
        self._manager.delete(update)
        self._facts.pop(update, None)

    def _write_amended(self) -> None:
        """Writes what is to be amended; not to be called while a checkpoint is being written."""
        unwritten, self._unwritten = self._unwritten, {}
        if self._read_only or not hosts.is_primary():
            return
        for update, values in unwritten.items():
            if update in self.updates():
                write_amended(self.directory, update, values)

    def _read(self, asked: int | None, read: Callable[[int], Value]) -> tuple[Value, dict]:
        """What `read` makes of the checkpoint of `asked`, or of the newest good one; and its meta."""
        while True:
            update = self.verify(asked)
            self._verified.discard(update)  # a disk may damage it before it is read again
            path, has_digests = self._folder / str(update), False
            try:
                has_digests = shelf.has_digests(path)
                meta = self._meta(update)
                return read(update), meta
            except (UserError, jax.errors.JaxRuntimeError, MemoryError):
                raise
            except Exception as error:
                if path.exists() and has_digests:
                    raise  # it is what was written
                text = " ".join(str(error).split())
                self._give_up(update, f"{type(error).__name__}: {text[:200]}", asked)

    def _restore(self, update: int, abstract: Any, only: tuple[str, ...] = ()) -> Any:
        flat, treedef = jax.tree_util.tree_flatten(abstract)
        wanted = {path: leaves.stored(leaf) for path, leaf in zip(leaves.paths(abstract), flat)}
        place = os.path.join(self.directory, str(update), shelf.STATE)
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(Path(place)).tree
        found = dict(zip(leaves.paths(tree), jax.tree_util.tree_leaves(tree)))
        found = {path: leaf for path, leaf in found.items() if path[: len(only)] == only}
        leaves.check_leaves(wanted, found, f"the checkpoint of update {update} in {self.directory}")
        tree = leaves.nest(wanted)
        request = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        with ocp.Checkpointer(handler) as reader:
            restored = reader.restore(place, args=request)
        by_path = dict(zip(leaves.paths(restored), jax.tree_util.tree_leaves(restored)))
        arrays = [leaves.unstored(by_path[path], leaf) for path, leaf in zip(leaves.paths(abstract), flat)]
        return jax.tree_util.tree_unflatten(treedef, arrays)


class _DigestedTree(ocp.PyTreeCheckpointHandler):
    """Writes a tree of arrays and, when every process has written its part, the digests of their files."""

    def finalize(self, directory: Any) -> None:
        """Called by orbax on the first process, in the thread of the save, before the folder gets its name."""
        # orbax looks for the parts of the checkpoint by a pattern. Its own kind of path also reads brackets and stars
        # in the names of folders as patterns, and then finds no parts and raises nothing.
        directory = Path(directory)
        super().finalize(directory)
        if not (directory / shelf.MERGED).exists():
            raise OSError(f"the parts of a checkpoint were not put together in {directory}")
        digests.write(directory)


@ocp.args.register_with_handler(_DigestedTree, for_save=True, for_restore=True)
@dataclasses.dataclass
class _DigestedTreeSave(ocp.args.PyTreeSave):
    """The tree to be written. orbax finds the handler by this class."""


class _Preserve(ocp.checkpoint_managers.PreservationPolicy):
    """What orbax is not to delete; `facts` is shared with `Checkpoints` and grows."""

    def __init__(self, config: CheckpointConfig, facts: dict[int, Facts]):
        self._config = config
        self._facts = facts

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        updates = [checkpoint.step for checkpoint in checkpoints]
        stay = kept(updates, self._facts, self._config)
        return [update in stay for update in updates]
