"""Reads our parameters from tensors in files, and makes such tensors of them, one tensor at a time.

The arrays of all layers are stacked along a leading dimension, and those of all experts along the next. Each is made on
the devices, in the layout that it is to have there, and filled layer by layer, so that the host never holds more than
the tensor that is being read.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.convert.files.tensor_files import Tensors
from llmjax.convert.places import STACKS, Matched, Part, Place, flatten
from llmjax.errors import UserError
from llmjax.types import Params

# The types in which weights are written, by their names in config.json.
WRITTEN = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": jnp.dtype(jnp.bfloat16),
}

# (name of the tensor, digest of its bytes) -> None
Note = Callable[[str, str], None]


def read_params(
    places: Mapping[str, Place],
    matched: Matched,
    tensors: Tensors,
    abstract: Params,
    note: Note = lambda name, digest: None,
) -> Params:
    """Our float32 parameters from the tensors of a file.

    abstract  the parameters as `jax.ShapeDtypeStruct`, with their shardings if they have some
    note      is told the SHA-256 of the bytes of each tensor

    Raises UserError for a tensor that is not finite, and for an output matrix that should repeat the embedding and does
    not.
    """
    wanted, arrays = flatten(abstract), {}
    for path, leaf in wanted.items():
        if path.split("/")[0] in STACKS:
            arrays[path] = _zeros(leaf)
    for name, place in places.items():
        theirs = tensors[matched.names[name]].read()
        note(matched.names[name], digest(theirs))
        if not np.isfinite(theirs.astype(np.float32, copy=False)).all():
            raise UserError(f"the tensor {name} is not finite; use a model whose training did not fail")
        for part, ours in place.ours(theirs):
            arrays[part.path] = _put(wanted[part.path], arrays.get(part.path), part, ours)
    for copy, other in matched.copies.items():
        _check_copy(copy, matched.names[other], tensors)
        note(copy, digest(tensors[copy].read()))
    _, treedef = jax.tree.flatten(abstract)
    return jax.tree.unflatten(treedef, [arrays[path] for path in wanted])


def digest(array: np.ndarray) -> str:
    """The SHA-256 of the bytes of an array, in hex."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _zeros(leaf: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, jnp.float32), out_shardings=leaf.sharding)()


def _put(leaf: Any, stack: jax.Array | None, part: Part, ours: np.ndarray) -> jax.Array:
    """The parameter with `ours` in it: at its place in the stack, or by itself."""
    sharding = leaf.sharding
    if part.index and isinstance(sharding, NamedSharding):
        # No mesh axis splits the layers or the experts.
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(part.index) :]))

    def piece(index: Any) -> np.ndarray:
        return np.ascontiguousarray(ours[index], np.float32)

    if sharding is None:
        array = jnp.asarray(piece(...))
    else:
        array = jax.make_array_from_callback(part.shape, sharding, piece)
    return _fill(leaf.sharding)(stack, array, part.index) if part.index else array


@functools.cache
def _fill(sharding: Any) -> Callable[..., jax.Array]:
    """A function (stack, array, index) -> the stack with the array at this index. The stack is donated."""

    def fill(stack: jax.Array, array: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        start: list[Any] = [*index, *(0,) * array.ndim]
        return jax.lax.dynamic_update_slice(stack, array.reshape(*(1,) * len(index), *array.shape), start)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


def _check_copy(name: str, other: str, tensors: Tensors) -> None:
    if not np.array_equal(tensors[name].read(), tensors[other].read()):
        raise UserError(
            f"{name} differs from {other}, although config.json has tie_word_embeddings=true; correct config.json"
        )


def write_params(
    places: Mapping[str, Place], params: Params, dtype: str, note: Note = lambda name, digest: None
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of theirs with its name, in the order of `places`. `dtype` is a key of `WRITTEN`.

    Raises UserError for a number that is not finite, or that the type cannot hold.
    """
    ours = flatten(params)
    for name, place in places.items():
        parts = [ours[part.path][part.index] for part in place.parts]
        theirs = place.theirs(np.asarray(part, np.float32) for part in parts)
        # An overflow is found below, and told in a sentence.
        with np.errstate(over="ignore"):
            theirs = np.ascontiguousarray(theirs.astype(WRITTEN[dtype]))
        if not np.isfinite(theirs.astype(np.float32, copy=False)).all():
            raise UserError(
                f"the tensor {name} is not finite as {dtype}; write it as float32, or use another checkpoint"
            )
        note(name, digest(theirs))
        yield name, theirs


def sizes(places: Mapping[str, Place], dtype: str) -> dict[str, int]:
    """The bytes of each tensor of theirs, in the order of `places`."""
    return {name: int(np.prod(place.shape)) * WRITTEN[dtype].itemsize for name, place in places.items()}
