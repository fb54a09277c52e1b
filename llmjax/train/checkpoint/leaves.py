"""The leaves of a state by name, so that a stored tree does not depend on the Python classes of the state.

A leaf is stored under its path, such as `params/embed/table`. A random key is stored as the integers that it consists
of.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from llmjax.errors import UserError
from llmjax.train.trees import nest


def paths(tree: Any) -> list[tuple[str, ...]]:
    """The path of each leaf as names: ("params", "embed", "table")."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in flat]


def to_tree(state: Any) -> dict:
    """The state as nested dictionaries of plain arrays, as it is written."""
    leaves = jax.tree_util.tree_leaves(state)
    arrays = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
    return nest(dict(zip(paths(state), arrays)))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of the array as which `leaf` is stored."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    if not _is_key(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def from_stored(array: jax.Array, leaf: Any) -> jax.Array:
    """The leaf that was stored as `array`; `leaf` says whether it is a random key."""
    if not _is_key(leaf):
        return array
    # The dtype of an abstract key does not name its generator, and a traced key does.
    impl = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), leaf.dtype))
    return jax.random.wrap_key_data(array, impl=impl[0])


def check_leaves(wanted: dict, found: dict, where: str) -> None:
    """Raises UserError at the first leaf of `found`, in a checkpoint, that is not as `wanted` says.

    orbax itself would cast it, or leave it out, in silence.
    """
    for path, leaf in wanted.items():
        name = "/".join(path)
        if path not in found:
            raise UserError(
                f"{where} has no {name}; use the model and optimizer config, and the version of llmjax, it was "
                "trained with"
            )
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
