"""The blocks of a network: its embedding, each of its layers, its final norm.

A block is a top-level entry of the parameters; where its leaves are stacked over layers, every layer is one.
Whether they are is read from names: `wq_DNH` has three dimensions of its own, so any further, leading ones
count layers. Names without letters (norm scales, biases) follow the leaves beside them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.types import Array, Params


def dimension_letters(name: str) -> str:
    """The letters at the end of a leaf's name, "DNH" of `wq_DNH`; "" where it has none."""
    end = name.rsplit("_", 1)[-1]
    return end if end.isupper() else ""


def layer_dims(name: str, block: Params) -> int:
    """How many leading dimensions the leaves of a block, a top-level entry called `name`, have for layers.

    Raises ValueError where the names of its leaves disagree.
    """
    leaves = [(str(path[-1].key), x.ndim) for path, x in jax.tree_util.tree_leaves_with_path({name: block})]
    counts = {ndim - len(dimension_letters(leaf)) for leaf, ndim in leaves if dimension_letters(leaf)}
    counts = counts or {ndim - 1 for _, ndim in leaves}  # scales and biases alone: a vector each
    if len(counts) != 1 or min(counts) < 0:
        raise ValueError(f"the dimension letters of {name!r} leave {sorted(counts)} dimensions for layers")
    return counts.pop()


def block_norms(tree: Params) -> dict[str, Array]:
    """The norm over all leaves of each top-level entry: float32 [L] where it is stacked, one for a layer, else []."""
    norms = {}
    for name, block in tree.items():
        lead = layer_dims(name, block)
        squares = [
            jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(lead, x.ndim)))
            for x in jax.tree.leaves(block)
        ]
        norms[name] = jnp.sqrt(sum(squares[1:], squares[0]))
    return norms
