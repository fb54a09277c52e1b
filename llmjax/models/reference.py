"""A model of any family that remembers the parameters with which its run began, to be compared with them."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from llmjax.models.wrapped import Wrapped
from llmjax.types import Params

# The entry of the tree of parameters that holds the remembered ones, which never train. The others are the model's own.
REFERENCE = "reference"


class Referenced(Wrapped):
    """The `Model` contract for a model of another family, with a frozen copy of its parameters."""

    def init(self, rng: jax.Array) -> Params:
        return with_reference(self.base.init(rng))

    def axes(self) -> Params:
        return with_reference(self.base.axes())


def own(params: Mapping) -> Params:
    """The parameters without the remembered ones."""
    return {name: x for name, x in params.items() if name != REFERENCE}


def with_reference(params: Mapping) -> Params:
    """`params`, which are also those to be remembered; what they remembered before is forgotten."""
    params = own(params)
    return {**params, REFERENCE: params}
