"""Where each tensor of a file goes in our parameters. None may be missing, left over or of another shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llmjax.convert.architectures.contract import Architecture
from llmjax.convert.architectures.forms import Form, Shape, Stored
from llmjax.convert.files.tensor_files import Tensors
from llmjax.errors import UserError
from llmjax.ranges import shown
from llmjax.types import Params

# The first name of the path of our parameters that have a leading dimension for the layers, in a decoder or the only
# stack of layers there is, and in an encoder.
LAYERS, ENCODER = STACKS = ("layers", "encoder")
# The path of the table of token embeddings.
EMBEDDING = "embedding/embedding_VD"


@dataclasses.dataclass(frozen=True)
class Part:
    """Our half of a tensor.

    path   the path of a parameter
    index  where in the parameter it lies: () for the whole, (layer,), or (layer, expert)
    shape  the shape of what lies there
    """

    path: str
    index: tuple[int, ...]
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor of theirs goes: into one or several parts of ours, side by side along its `axis`."""

    form: Form
    parts: tuple[Part, ...]
    axis: int

    @property
    def shape(self) -> Shape:
        """The shape of the tensor of theirs."""
        shapes = [self.form.shape(part.shape) for part in self.parts]
        whole = list(shapes[0])
        whole[self.axis] = sum(shape[self.axis] for shape in shapes)
        return tuple(whole)

    def ours(self, theirs: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
        """The parts of ours, as views where possible."""
        sizes = [self.form.shape(part.shape)[self.axis] for part in self.parts]
        pieces = np.split(theirs, np.cumsum(sizes)[:-1], axis=self.axis) if sizes[1:] else [theirs]
        for part, piece in zip(self.parts, pieces, strict=True):
            yield part, self.form.ours(piece, part.shape)

    def theirs(self, ours: Iterable[np.ndarray]) -> np.ndarray:
        """The tensor of theirs, from our parts in order."""
        pieces = [self.form.theirs(array) for array in ours]
        return np.concatenate(pieces, self.axis) if pieces[1:] else pieces[0]


def flatten(params: Params) -> dict[str, Any]:
    """The leaves of nested parameters by their paths, such as `layers/attention/wq_DNH`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def places_of(architecture: Architecture, shapes: Params) -> dict[str, Place]:
    """The place of each tensor of theirs in a model whose parameters have these `shapes`, by its name.

    A line of the table is left out if the model has no such parameter, such as an output matrix of its own. Raises
    UserError if the model has a parameter that the table does not mention.
    """
    ours = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    found: dict[str, Place] = {}

    def add(name: str, line: Stored, prefix: str, *layer: int) -> None:
        paths = tuple(prefix + path for path in line.ours)
        if not all(path in ours for path in paths):
            return
        # A second `{}` stands for the number of the expert.
        for rest in np.ndindex(ours[paths[0]][len(layer) : name.count("{}")]):
            index = (*layer, *rest)
            parts = tuple(Part(path, index, ours[path][len(index) :]) for path in paths)
            found[name.format(*index)] = Place(line.form, parts, line.axis)

    for name, line in architecture.outer.items():
        add(name, line, "")
    for stack, lines in ((LAYERS, architecture.layer), (ENCODER, architecture.encoder)):
        counts = (shape[0] for path, shape in ours.items() if path.startswith(f"{stack}/"))
        for layer in range(next(counts, 0)):
            for name, line in lines.items():
                add(name, line, f"{stack}/", layer)
    left = ours.keys() - {part.path for place in found.values() for part in place.parts}
    if left:
        raise UserError(
            f"{architecture.name} has no tensor for our parameter {min(left)}; use another family"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Matched:
    """The tensors of a file that go into a model, and those that do not.

    names    our name of a tensor in the table -> its name in the file
    buffers  tensors that hold nothing that was learned
    copies   tensors that repeat another one, such as an output matrix that is the embedding: {name in the file: our
             name of the other}
    left_out  tensors that were learned and have no place in our model, with what they are, by their names in the file
    """

    names: dict[str, str]
    buffers: tuple[str, ...]
    copies: dict[str, str]
    left_out: dict[str, str]

    @property
    def remark(self) -> str:
        """A sentence about the tensors that have no place, with their number; nothing if there are none."""
        if not self.left_out:
            return ""
        what, count = " and ".join(dict.fromkeys(self.left_out.values())), len(self.left_out)
        return (
            f"{count} tensor{'s are' if count > 1 else ' is'} left out for want of a place in llmjax: {what}"
        )


def match(architecture: Architecture, places: Mapping[str, Place], tensors: Tensors, where: str) -> Matched:
    """Which tensor of the file is which. `where` names the model in errors.

    Raises UserError, in one sentence, if a tensor is missing, left over, or of another shape.
    """
    prefix, says = architecture.prefix, architecture.described_by
    # Some files leave out the first name, which all but the output matrix have.
    short = bool(prefix) and not any(name.startswith(prefix) for name in tensors)
    full = {architecture.full_name(name, short): name for name in tensors}
    if missing := [name for name in places if name not in full]:
        raise UserError(
            f"{where} lacks the tensor {missing[0]}{_and_more(missing)}, which its {says} asks for; fetch the "
            f"whole model, or correct its {says}"
        )
    left, buffers, copies, left_out = [], [], {}, {}
    embedding = next(name for name, place in places.items() if place.parts[0].path == EMBEDDING)
    repeats = {architecture.output: embedding, **architecture.repeats}
    for name in sorted(full.keys() - places.keys()):
        if architecture.skips(name):
            buffers.append(full[name])
        elif name in repeats:
            copies[full[name]] = repeats[name]
        elif what := architecture.useless(name):
            left_out[full[name]] = what
        else:
            left.append(name)
    if left:
        raise UserError(
            f"{where} has the tensor {shown(min(left))}{_and_more(left)}, which {architecture.name} with this "
            f"{says} does not have; use a model without it, or correct its {says}"
        )
    for name, place in places.items():
        shape = tensors[full[name]].shape
        if shape != place.shape:
            raise UserError(
                f"{where} has {name} of shape {list(shape)}, and its {says} asks for {list(place.shape)}; fetch "
                "the files that belong together"
            )
    names = {name: full[name] for name in places}
    return Matched(names, tuple(sorted(buffers)), copies, left_out)


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if names[1:] else ""
