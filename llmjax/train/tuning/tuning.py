"""Which parameters train, and how those of the model are made of the trained and the frozen ones.

The parameters of a run are two trees. The trained tree has gradients, sums, clipping, decay and optimizer state, and
is what a checkpoint holds. The frozen tree has none of these: it is an input of the step that comes out as it went in.
A parameter lies in the first, in the second, or in both: an adapted matrix is frozen, and its adapters train in its
place; of a stack whose first layers are frozen, the others train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.errors import UserError
from llmjax.parallel.rules import is_axes, partition_spec
from llmjax.train.optim.param_roles import Axes, Role, Roles
from llmjax.train.trees import Path, flatten, nest
from llmjax.train.tuning.lora import A, Adapter, B, LoraConfig
from llmjax.train.tuning.names import choose_paths
from llmjax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Splits the parameters of a model into trained and frozen ones, and joins them. By default all train.

    axes      the logical axes of the parameters
    adapters  the adapters of frozen matrices, by the paths of the matrices
    frozen    the paths of the parameters that are frozen as a whole, adapted matrices among them
    cuts      the paths of stacks of which the first layers are frozen, and of how many layers
    same      the paths of frozen parameters that are the same as others, and the paths of these, which alone are kept
    """

    axes: Axes = dataclasses.field(default_factory=dict)
    adapters: Mapping[Path, Adapter] = dataclasses.field(default_factory=dict)
    frozen: frozenset[Path] = frozenset()
    cuts: Mapping[Path, int] = dataclasses.field(default_factory=dict)
    same: Mapping[Path, Path] = dataclasses.field(default_factory=dict)

    @property
    def is_partial(self) -> bool:
        """Whether any parameter is frozen."""
        return bool(self.frozen or self.cuts)

    def split(self, params: Params, rng: Array) -> tuple[Params, Params]:
        """(trained, frozen) of the parameters of a model; new adapters draw from `rng`."""
        if not self.is_partial:
            return params, {}
        trained: dict[Path, Any] = {}
        frozen: dict[Path, Any] = {}
        for path, x in flatten(params).items():
            if path in self.adapters:
                trained[*path, A], trained[*path, B] = self.adapters[path].init(rng, path, x.shape)
            if path in self.same:
                continue
            if path in self.frozen:
                frozen[path] = x
            elif count := self.cuts.get(path):
                frozen[path], trained[path] = x[:count], x[count:]
            else:
                trained[path] = x
        return nest(trained), nest(frozen)

    def join(self, trained: Params, frozen: Params) -> Params:
        """The parameters of the model: adapters added to their matrices, and the layers of a stack together."""
        if not self.is_partial:
            return trained
        ours, theirs = flatten(trained), flatten(frozen)

        def whole(path: Path) -> Array:
            if path in self.adapters:
                return theirs[path] + self.adapters[path].product(ours[*path, A], ours[*path, B])
            if path in self.cuts:
                return jnp.concatenate([theirs[path], ours[path]])
            return theirs[self.same.get(path, path)] if path in self.frozen else ours[path]

        return nest({path: whole(path) for path in flatten(self.axes)})

    @property
    def trained_axes(self) -> Axes:
        """The logical axes of the trained tree."""
        found: dict[Path, Any] = {}
        for path, axes in flatten(self.axes).items():
            if path in self.adapters:
                found[*path, A], found[*path, B] = self.adapters[path].axes
            elif path not in self.frozen:
                found[path] = axes
        return nest(found)

    @property
    def frozen_axes(self) -> Axes:
        """The logical axes of the frozen tree."""
        return nest(
            {
                path: axes
                for path, axes in flatten(self.axes).items()
                if (path in self.frozen or path in self.cuts) and path not in self.same
            }
        )

    @property
    def frozen_roles(self) -> Roles:
        """The roles of the parameters of the frozen tree."""
        return Roles(self.frozen_axes)

    @property
    def frozen_specs(self) -> Any:
        """How the frozen tree lies on the mesh, as a tree of PartitionSpecs."""
        return jax.tree.map(partition_spec, self.frozen_axes, is_leaf=is_axes)


# All parameters train.
WHOLE = Tuning()


def make_tuning(
    axes: Axes,
    lora: LoraConfig,
    frozen: Sequence[str],
    shapes: Params,
    added: Sequence[str] = (),
    kept: Sequence[str] = (),
) -> Tuning:
    """What `lora` and train.frozen make of a model with these `axes`.

    shapes  the parameters of the model, of which only the shapes are looked at
    added   entries of the tree of parameters that the task adds, which train as a whole also with adapters
    kept    entries that hold all other parameters as they were when the run began, and never train

    Raises UserError for a name that no parameter has, and where nothing is left to train.
    """
    if lora.rank and frozen:
        raise UserError(
            f"train.frozen={tuple(frozen)} has no meaning with lora.rank={lora.rank}, which freezes all but the "
            "adapters; set train.frozen to ()"
        )
    own = {name: x for name, x in axes.items() if name not in kept}
    if lora.rank:
        tuning = _with_adapters(own, lora, added)
    elif frozen:
        tuning = _partly_frozen(own, frozen, shapes)
    else:
        tuning = Tuning(own)
    if not kept:
        return tuning
    paths = [path for path in flatten(axes) if path[0] in kept]
    # What never trains is as it was.
    same = {path: path[1:] for path in paths if path[1:] in tuning.frozen}
    return dataclasses.replace(tuning, axes=axes, frozen=tuning.frozen | {*paths}, same=same)


def _with_adapters(axes: Axes, lora: LoraConfig, added: Sequence[str]) -> Tuning:
    """All parameters frozen but those that the task adds, and adapters for the matrices that lora.targets names."""
    roles = {path: Role.of(names) for path, names in flatten(axes).items()}
    base = [path for path in roles if path[0] not in added]
    matrices = [path for path in base if roles[path].is_hidden_matrix]
    chosen = {path for target in lora.targets for path in choose_paths("lora.targets", target, matrices)}
    if not chosen:
        raise UserError(
            f"lora.targets=() leaves lora.rank={lora.rank} nothing to adapt; name matrices, or all"
        )
    adapters = {path: Adapter(roles[path], lora.rank, lora.scale) for path in matrices if path in chosen}
    return Tuning(axes, adapters, frozenset(base))


def _partly_frozen(axes: Axes, frozen: Sequence[str], shapes: Params) -> Tuning:
    """The parameters that train.frozen names frozen: whole ones, and the first layers of stacks."""
    roles = {path: Role.of(names) for path, names in flatten(axes).items()}
    sizes = {path: x.shape for path, x in flatten(shapes).items()}
    whole: set[Path] = set()
    cuts: dict[Path, int] = {}
    for pattern in frozen:
        name, colon, number = pattern.partition(":")
        found = choose_paths("train.frozen", name, roles)
        if not colon:
            whole |= found
            continue
        stacks = {path for path in found if roles[path].layers}
        most = min((sizes[path][0] for path in stacks), default=0)
        if not (number.isdecimal() and stacks == found and 0 < int(number) <= most):
            entries = dict.fromkeys(path[0] for path in roles if roles[path].layers)
            raise UserError(
                f"train.frozen has {pattern!r}, but a number after a colon is how many of the first layers of a stack "
                f"are frozen, from 1 to {most or 'all'}; use "
                f"{' or '.join(f'{entry}:1' for entry in entries) or 'names'}"
            )
        for path in found:
            cuts[path] = max(cuts.get(path, 0), int(number))
    whole |= {path for path, count in cuts.items() if count == sizes[path][0]}
    if whole == roles.keys():
        raise UserError(f"train.frozen={tuple(frozen)} leaves no parameter to train; leave some out")
    return Tuning(axes, {}, frozenset(whole), {path: n for path, n in cuts.items() if path not in whole})
