"""Checkpoints: the state, and beside it what a run needs to go on as if it had never stopped.

A checkpoint is the state (parameters, optimizer, random key, update count) plus a `meta` dictionary (data
cursor, tokens, seconds, resolved config, versions, data fingerprint). Arrays are stored under the path of
their leaf, `params/embed/table`, so that a checkpoint depends on names and not on Python classes, and can be
restored in part and onto any mesh. Saves are asynchronous: the device is read before `save` returns, so
donating the state afterwards is safe, but a save that nobody waits for at exit is lost. A process that dies
in a save, or while it deletes an old checkpoint, leaves only whole ones. This file alone knows orbax.

What is found out about a checkpoint after it was saved, such as its held-out loss, is amended to its meta: see
`retention.py`, which also says what is kept.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import absl.logging
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from llmjax.errors import UserError
from llmjax.parallel import hosts
from llmjax.ranges import COUNT, Range, check_ranges
from llmjax.train.retention import Facts, best_of, kept, read_amended, write_amended
from llmjax.train.which import check_name
from llmjax.types import Params

DELETED = "deleted"  # a folder beside the checkpoints


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
    init_from: str = ""
    init_checkpoint: str = "latest"

    def __post_init__(self):
        check_ranges("checkpoint", self)
        check_name("checkpoint.init_checkpoint", self.init_checkpoint)
        if self.init_checkpoint != "latest" and not self.init_from:
            raise UserError(
                f"checkpoint.init_checkpoint={self.init_checkpoint!r} has no meaning without checkpoint.init_from; "
                "name a workdir there, or leave it at latest"
            )


class Checkpoints:
    """The checkpoints in one directory. A context manager: leaving it waits for what is being written.

    `read_only` is for a process that does not train: it writes nothing and cleans nothing up, and so may look
    into the directory of a run that is under way.
    """

    def __init__(
        self, directory: str | Path, config: CheckpointConfig | None = None, *, read_only: bool = False
    ):
        self.config = config or CheckpointConfig()
        self.directory = str(directory) if "://" in str(directory) else os.path.abspath(directory)
        if absl.logging.get_verbosity() > absl.logging.WARNING:  # at INFO a save prints some seventy lines
            absl.logging.set_verbosity(absl.logging.WARNING)
        self._facts: dict[int, Facts] = {}
        self._saved_here: set[int] = set()
        self._unwritten: dict[int, dict] = {}  # what is to be amended once the checkpoint is written
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=_Preserve(self.config, self._facts),
            # Deleted where it is, a checkpoint would for a moment be one that lacks files.
            todelete_subdir=None if read_only else DELETED,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._read_only = read_only
        self._sweep()
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        for update in self.updates():
            self._facts[update] = Facts.of(self.read_meta(update))

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
        held_out_loss: float | None = None,
        spare: bool = False,
    ) -> bool:
        """Starts writing `state` and `meta` (JSON) as the checkpoint of `update`; False if it exists.

        `held_out_loss` ranks it among the others; a checkpoint without one is never the best. A `spare` one is
        kept while it is the newest or the best, until `amend` says that it is no longer spare.
        """
        self.wait()
        if update in self.updates() and self._finite_loss(update) is False:
            self._delete(update)
        if update in self.updates():
            return False
        newest = self.latest()
        if newest is not None and update < newest:
            raise ValueError(f"update {update} is older than checkpoint {newest} in {self.directory}")
        loss = held_out_loss if held_out_loss is not None and math.isfinite(held_out_loss) else None
        meta = {**meta, "held_out_loss": loss} | ({"spare": True} if spare else {})
        self._facts[update] = Facts.of(meta)
        self._saved_here.add(update)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(_to_tree(state)), meta=ocp.args.JsonSave(meta))
        if not self._manager.save(update, args=items, force=True):
            raise RuntimeError(f"the checkpoint of update {update} was not saved in {self.directory}")
        return True

    def restore(self, abstract_state: Any, update: int | None = None) -> tuple[Any, dict]:
        """The state and meta of `update` (default: the latest), laid out as `abstract_state` says.

        `abstract_state` is the state with `jax.ShapeDtypeStruct` (shape, dtype, sharding) for leaves. Raises
        UserError where there is no such checkpoint, and where a leaf is missing, left over, or of another
        shape or dtype.
        """
        update = self._existing(update)
        return self._restore(update, abstract_state), self.read_meta(update)

    def restore_params(self, abstract_params: Params, update: int | None = None) -> tuple[Params, dict]:
        """The parameters alone, for evaluation and generation: nothing of the optimizer is read."""
        update = self._existing(update)
        params = self._restore(update, {"params": abstract_params}, only=("params",))["params"]
        return params, self.read_meta(update)

    def read_meta(self, update: int | None = None) -> dict:
        """What was saved beside the arrays of `update` (default: the latest), and what was amended since."""
        update = self._existing(update)
        meta = self._manager.restore(update, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        return meta | read_amended(self.directory, update) | self._unwritten.get(update, {})

    def amend(self, update: int, **values: Any) -> None:
        """Adds `values`, which JSON holds, to the meta of a checkpoint; nothing happens where there is none.

        They are on disk at once where the checkpoint is, and otherwise when the next `wait` or `close` returns.
        """
        if update not in self.updates():
            return
        self._facts[update] = self._facts.get(update, Facts()).amended(values)
        self._unwritten[update] = self._unwritten.get(update, {}) | values
        if not self._manager.is_saving_in_progress():
            self._write_amended()

    def updates(self) -> list[int]:
        """The updates that have a checkpoint, ascending, with the one being written."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest checkpoint's update, or None; those that are known to give no finite loss do not count."""
        return max(
            (update for update in self.updates() if self._finite_loss(update) is not False), default=None
        )

    def latest_good(self) -> int | None:
        """The newest update with whose parameters a finite loss has been seen since, or None."""
        return max((update for update in self.updates() if self._finite_loss(update) is True), default=None)

    def best(self) -> int | None:
        """The update with the lowest held-out loss of those that were evaluated, or None."""
        return best_of(self.updates(), self._facts)

    def would_be_best(self, held_out_loss: float) -> bool:
        """Whether a checkpoint with this loss would be the new best, and is to be kept as such."""
        best = self.best()
        return (
            self.config.keep_best
            and math.isfinite(held_out_loss)
            and (best is None or held_out_loss < self._facts[best].held_out_loss)
        )

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

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong in writing."""
        self._manager.wait_until_finished()
        self._write_amended()
        if not self._read_only:
            for update in set(self.updates()) - kept(self.updates(), self._facts, self.config):
                self._delete(update)
        self._sweep()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self.wait()
        self._manager.close()
        self._sweep()

    def _sweep(self) -> None:
        """Removes what was put aside to be deleted."""
        if not self._read_only and hosts.is_primary():
            shutil.rmtree(os.path.join(self.directory, DELETED), ignore_errors=True)

    def _existing(self, update: int | None) -> int:
        found = self.updates()
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

    def _restore(self, update: int, abstract: Any, only: tuple[str, ...] = ()) -> Any:
        self.wait()  # for the one being written, should it be the one asked for
        leaves, treedef = jax.tree_util.tree_flatten(abstract)
        wanted = {path: _stored(leaf) for path, leaf in zip(_paths(abstract), leaves)}
        found = self._stored_leaves(update)
        found = {path: leaf for path, leaf in found.items() if path[: len(only)] == only}
        _check_leaves(wanted, found, f"the checkpoint of update {update} in {self.directory}")
        tree = _nest(wanted)
        request = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        restored = self._manager.restore(update, args=ocp.args.Composite(state=request)).state
        flat = {path: leaf for path, leaf in zip(_paths(restored), jax.tree_util.tree_leaves(restored))}
        arrays = [_unstored(flat[path], leaf) for path, leaf in zip(_paths(abstract), leaves)]
        return jax.tree_util.tree_unflatten(treedef, arrays)

    def _stored_leaves(self, update: int) -> dict[tuple[str, ...], Any]:
        tree = self._manager.item_metadata(update).state.tree
        return dict(zip(_paths(tree), jax.tree_util.tree_leaves(tree)))


class _Preserve(ocp.checkpoint_managers.PreservationPolicy):
    """What orbax is not to delete; `facts` is shared with `Checkpoints` and grows."""

    def __init__(self, config: CheckpointConfig, facts: dict[int, Facts]):
        self._config = config
        self._facts = facts

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        updates = [checkpoint.step for checkpoint in checkpoints]
        stay = kept(updates, self._facts, self._config)
        return [update in stay for update in updates]


def _paths(tree: Any) -> list[tuple[str, ...]]:
    """The path of each leaf as names: ("params", "embed", "table")."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in flat]


def _nest(leaves: dict[tuple[str, ...], Any]) -> dict:
    """Nested dictionaries from paths: what is written, whatever classes the state is made of."""
    tree: dict = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _to_tree(state: Any) -> dict:
    leaves = jax.tree_util.tree_leaves(state)
    arrays = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
    return _nest(dict(zip(_paths(state), arrays)))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """The array under which `leaf` is stored: itself, or the data of a random key."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    if not _is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _unstored(array: jax.Array, leaf: Any) -> jax.Array:
    if not _is_key(leaf):
        return array
    impl = []  # only a traced key tells its implementation, not an abstract one
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), leaf.dtype))
    return jax.random.wrap_key_data(array, impl=impl[0])


def _check_leaves(wanted: dict, found: dict, where: str) -> None:
    """Raises UserError at the first leaf that differs: orbax would cast it, or leave it out, in silence."""
    for path, leaf in wanted.items():
        name = "/".join(path)
        if path not in found:
            raise UserError(f"{where} has no {name}; use the model and optimizer config it was trained with")
        stored = found[path]
        for what, ours, theirs in (
            ("shape", tuple(leaf.shape), tuple(stored.shape)),
            ("dtype", jnp.dtype(leaf.dtype).name, jnp.dtype(stored.dtype).name),
        ):
            # Older versions of an optimizer counted updates in whole numbers where now they count parts of one.
            is_count = path[-1] == "count" and jnp.issubdtype(stored.dtype, jnp.integer)
            if ours != theirs and not (what == "dtype" and is_count):
                raise UserError(
                    f"{where} has {name} with {what} {theirs}, but this config asks for {ours}; "
                    "use the model and optimizer config it was trained with"
                )
    left = sorted("/".join(path) for path in set(found) - set(wanted))
    if left:
        raise UserError(
            f"{where} has {left[0]}, which this config does not; "
            "use the model and optimizer config it was trained with"
        )
