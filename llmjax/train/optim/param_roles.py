"""What each parameter is (matrix, lookup table or vector), read from the logical axes of its dimensions.

`model.axes()` names the dimensions of every parameter, and the table in `parallel/rules.py` says what a dimension of
that name does when the parameter is applied. Optimizers, clipping and the engines of accumulation ask this module. It
never looks at the name of a parameter or at the number of its dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.parallel.rules import is_axes, side_of
from llmjax.types import Array, Params

# The tree of the parameters with a tuple of logical axis names in the place of each array.
Axes = Any


@dataclasses.dataclass(frozen=True)
class Role:
    """What each dimension of one parameter does. A dimension is given by its number, and most roles have none.

    layers   the leading dimensions whose every index is a layer, with a parameter of its own
    stack    the dimensions whose every index is a parameter of its own: `layers`, and others such as experts
    rows     the rows of a table, of which the number of a token picks one
    classes  the dimension that the output head chooses among
    inputs   the dimensions that are summed over when the parameter is applied
    outputs  all other dimensions
    """

    axes: tuple[str, ...]
    layers: tuple[int, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    classes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, axes: tuple[str, ...]) -> Role:
        """The role of a parameter with these logical axes; UserError for an axis that the rules table lacks."""
        sides: dict[str, tuple[int, ...]] = {
            side: () for side in ("stack", "rows", "classes", "inputs", "outputs")
        }
        for dimension, name in enumerate(axes):
            sides[side_of(name)] += (dimension,)
        layers = tuple(i for i, name in enumerate(axes) if name == "layers")
        if layers != tuple(range(len(layers))):
            raise ValueError(f"of the axes {axes} the layers must come first")
        return cls(axes, layers, **sides)

    @property
    def is_vector(self) -> bool:
        """Whether it is a norm's scale or a bias. These multiply or are added, never decay, and stay in float32."""
        return not self.inputs

    @property
    def is_table(self) -> bool:
        """Whether it is a table whose rows are looked up, such as an embedding."""
        return bool(self.rows)

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix inside the network, and no table, output head or vector."""
        return bool(self.inputs) and not self.rows and not self.classes

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dimensions of the two sides of a matrix or table, in the order of the array; ((), ()) for a vector.

        One side are the inputs, the other side all dimensions that are neither inputs nor in `stack`. ValueError where
        the dimensions of one side do not lie together.
        """
        if self.is_vector:
            return (), ()
        others = tuple(sorted({*self.rows, *self.classes, *self.outputs}))
        first, second = sorted((self.inputs, others))
        if first + second != tuple(sorted(first + second)) or not first:
            raise ValueError(f"the axes {self.axes} do not describe a matrix with two sides")
        return first, second


class Roles:
    """The role of every parameter of a model, by its place in the tree of parameters."""

    def __init__(self, axes: Axes):
        leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes)
        self._roles = {path: Role.of(names) for path, names in leaves}

    def role(self, path: tuple[Any, ...], leaf: Array) -> Role:
        """The role of the parameter at a `path` of jax.tree_util."""
        return self._roles[path]

    def map(self, function: Callable[..., Any], tree: Any, *others: Any) -> Any:
        """Applies `function(role, leaf, ...)` to every leaf of trees like the parameters. Leaves may be missing."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, *rest: function(self.role(path, leaf), leaf, *rest), tree, *others
        )

    def matrices_and_tables(self, params: Params) -> Params:
        """A tree of bools like `params`: True for every parameter that decays, which norm scales and biases do not."""
        return self.map(lambda role, _: not role.is_vector, params)

    def block_norms(self, tree: Params) -> dict[str, Array]:
        """The norm of all leaves of each top-level entry of a tree like the parameters, by the name of the entry.

        The norm is float32 [], or float32 [L] with one norm a layer where the leaves of the entry are stacked over
        layers. ValueError where some leaves of an entry are stacked over layers and others are not.
        """
        squares: dict[str, list[Array]] = {}
        stacks: dict[str, set[tuple[int, ...]]] = {}

        def add(role: Role, x: Array, path: tuple[Any, ...]) -> None:
            rest = tuple(range(len(role.layers), x.ndim))
            squares.setdefault(path[0].key, []).append(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=rest))
            stacks.setdefault(path[0].key, set()).add(role.layers)

        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            add(self.role(path, x), x, path)
        if mixed := [name for name, found in stacks.items() if len(found) > 1]:
            raise ValueError(f"some leaves of {mixed[0]!r} are stacked over layers and others are not")
        # The order of the tree decides in which order a caller sums these norms, so that it must not change.
        return {name: jnp.sqrt(sum(squares[name][1:], squares[name][0])) for name in tree}

    def stacked(self, tree: Params) -> list[str]:
        """The top-level entries of `tree` whose leaves are stacked over layers."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return list(dict.fromkeys(path[0].key for path, x in leaves if self.role(path, x).layers))
