"""Trees of arrays in nested dictionaries, as flat dictionaries by path, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

# The names on the way to a leaf, such as ("layers", "attention", "wq_DNH").
Path = tuple[str, ...]


def flatten(tree: Any) -> dict[Path, Any]:
    """The leaves of nested dictionaries by their paths, in the order of the tree. A leaf may be a tuple."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def nest(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dictionaries, from leaves by their paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree
