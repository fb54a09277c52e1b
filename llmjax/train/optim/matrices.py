"""Which leaves of the parameters are matrices, and which of their axes are rows and columns.

The dimension letters at the end of a leaf's name decide, never its rank or its sizes: `wq_DNH` is D x (N H), whatever
the width of its heads, and further leading axes count layers, each with a matrix of its own. Which side is the input
makes no difference to what is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from llmjax.train.optim.param_roles import dimension_letters
from llmjax.types import Array, Params

# The side of a matrix that a dimension letter belongs to.
_SIDES = {
    "D": "model",
    "F": "mlp",
    "N": "heads",
    "K": "heads",
    "H": "heads",
    "V": "vocabulary",
    "T": "positions",
}
# The sides of tables, from which rows are looked up: no matrix of the network's inside.
_TABLES = ("vocabulary", "positions")


def map_named(function: Callable[[str, Array], Any], params: Params) -> Params:
    """`function` of the name and the value of each leaf, in a tree like `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, x: function(str(path[-1].key), x), params)


def is_vector(name: str) -> bool:
    """Whether a leaf is a norm's scale or a bias, which its name says."""
    return name.rsplit("_", 1)[-1] in ("scale", "bias")


def decay_mask(params: Params) -> Params:
    """True for every leaf that is decayed: all but those whose name ends in `scale` or `bias`."""
    return map_named(lambda name, _: not is_vector(name), params)


def matrix_axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of rows and those of columns of the leaf `name` of rank `ndim`; ((), ()) where it is no matrix.

    Scales, biases, and leaves whose letters all belong to one side are no matrices. Raises ValueError where the
    letters are not known or do not describe a matrix of this rank.
    """
    letters = dimension_letters(name)
    if is_vector(name) or not letters:
        return (), ()
    sides = [_SIDES.get(letter) for letter in letters]
    if len(set(sides)) == 1 and None not in sides:
        return (), ()
    split = next((i for i, side in enumerate(sides) if side != sides[0]), 0)
    lead = ndim - len(letters)
    if lead < 0 or None in sides or len(set(sides)) != 2 or sides[0] in sides[split:]:
        raise ValueError(f"the dimension letters of {name!r} do not describe a matrix of rank {ndim}")
    return tuple(range(lead, lead + split)), tuple(range(lead + split, ndim))


def muon_dimensions(name: str, ndim: int) -> MuonDimensionNumbers | None:
    """Rows and columns of a matrix of the network's inside, for Muon; None for what belongs to AdamW.

    To AdamW belong embeddings, tables of positions, norms and biases.
    """
    rows, columns = matrix_axes(name, ndim)
    is_table = any(_SIDES[letter] in _TABLES for letter in dimension_letters(name))
    return MuonDimensionNumbers(rows, columns) if rows and not is_table else None
