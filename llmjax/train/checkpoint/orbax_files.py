"""How a checkpoint is written and read by orbax. No other file of the package knows orbax.

A save writes into a folder with a temporary name. When all processes have written their parts, orbax puts the parts
together, this file adds the digests, and only then the folder gets its name: the number of the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import absl.logging
import jax
import orbax.checkpoint as ocp

from llmjax.train.checkpoint import digests, leaves, shelf
from llmjax.train.checkpoint.retention import Facts, Keeping, kept
from llmjax.train.trees import nest

# The folder, beside the checkpoints, into which a checkpoint is moved before it is deleted.
DELETED = "deleted"


def be_quiet() -> None:
    """Keeps orbax's log at warnings: at the level INFO it prints some seventy lines a save."""
    if absl.logging.get_verbosity() > absl.logging.WARNING:
        absl.logging.set_verbosity(absl.logging.WARNING)


def make_manager(
    directory: str, config: Keeping, facts: dict[int, Facts], on_complete: Callable[[], None]
) -> ocp.CheckpointManager:
    """orbax's manager of the checkpoints in `directory`, for a process that writes there.

    config, facts  what is kept, see `retention.kept`; `facts` may be filled later
    on_complete    called in the thread of a save, just before the checkpoint gets its name
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Preserve(config, facts),
        cleanup_tmp_directories=True,
        # A checkpoint that is deleted where it lies would for a moment be one that lacks files.
        todelete_subdir=DELETED,
        async_options=ocp.AsyncOptions(post_finalization_callback=on_complete),
    )
    handlers = {"state": _DigestedTree(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def start_saving(manager: ocp.CheckpointManager, update: int, state: Any, meta: dict) -> bool:
    """Starts to write `state` and `meta` as the checkpoint of `update`; False where orbax refuses.

    The arrays have been copied from the devices when this returns, so that they may be donated.
    """
    items = ocp.args.Composite(
        state=_DigestedTreeSave(leaves.to_tree(state)), meta=ocp.args.JsonSave(shelf.with_digest(meta))
    )
    # `force`: orbax has a cadence of its own, which is not to decide here.
    return manager.save(update, args=items, force=True)


def read_state(folder: Path, abstract: Any, where: str, only: tuple[str, ...] = ()) -> Any:
    """The arrays stored in `folder`, laid out on the devices as `abstract` says.

    abstract  a tree of ShapeDtypeStructs with shardings
    where     names the checkpoint in errors
    only      the first names of the paths that are read; others are neither read nor missed

    Raises UserError where a leaf is missing, left over, or of another shape or dtype.
    """
    flat, treedef = jax.tree_util.tree_flatten(abstract)
    wanted = {path: leaves.stored(leaf) for path, leaf in zip(leaves.paths(abstract), flat)}
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree
    found = dict(zip(leaves.paths(tree), jax.tree_util.tree_leaves(tree)))
    found = {path: leaf for path, leaf in found.items() if path[: len(only)] == only}
    # orbax itself casts a wrong dtype, and leaves out what is missing, without a word.
    leaves.check_leaves(wanted, found, where)
    tree = nest(wanted)
    request = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    with ocp.Checkpointer(handler) as reader:
        restored = reader.restore(str(folder), args=request)
    by_path = dict(zip(leaves.paths(restored), jax.tree_util.tree_leaves(restored)))
    arrays = [leaves.from_stored(by_path[path], leaf) for path, leaf in zip(leaves.paths(abstract), flat)]
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
    """Tells orbax which checkpoints it must not delete. `facts` is shared with `Checkpoints`, which adds to it."""

    def __init__(self, config: Keeping, facts: dict[int, Facts]):
        self._config = config
        self._facts = facts

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        updates = [checkpoint.step for checkpoint in checkpoints]
        stay = kept(updates, self._facts, self._config)
        return [update in stay for update in updates]
