"""How a tensor of another program lies in ours: the same, transposed, with its heads joined, or with 1 taken off.

Capital letters are the dimensions of `llmjax/types.py`; X stands for N x H, all heads side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """How one tensor of theirs becomes one of ours, and back. No function copies where a view will do.

    shape   our shape -> theirs
    theirs  our array -> theirs
    ours    (their array, our shape) -> ours
    """

    shape: Callable[[Shape], Shape]
    theirs: Callable[[np.ndarray], np.ndarray]
    ours: Callable[[np.ndarray, Shape], np.ndarray]


def _join(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-2] * shape[-1])


SAME = Form(lambda shape: shape, lambda y: y, lambda x, shape: x)
# [F, D] of theirs is our [D, F].
TRANSPOSED = Form(lambda shape: shape[::-1], lambda y: y.T, lambda x, shape: x.T)
# [D, X] of theirs is our [D, N, H], and [X] our [N, H].
HEADS = Form(_join, lambda y: y.reshape(_join(y.shape)), lambda x, shape: x.reshape(shape))
# [X, D] of theirs is our [D, N, H].
TRANSPOSED_HEADS = Form(
    lambda shape: _join(shape)[::-1],
    lambda y: y.reshape(_join(y.shape)).T,
    lambda x, shape: x.T.reshape(shape),
)
# A norm of theirs multiplies by 1 + scale, ours by scale (Gemma).
PLUS_ONE = Form(
    lambda shape: shape, lambda y: y - np.float32(1), lambda x, shape: x.astype(np.float32) + np.float32(1)
)

# A row [1, V] of theirs is our [V].
ONE_ROW = Form(lambda shape: (1, *shape), lambda y: y[None], lambda x, shape: x[0])


def _halves(x: np.ndarray, shape: Shape) -> np.ndarray:
    heads = x.T.reshape(*shape[:-1], shape[-1] // 2, 2)
    return heads.swapaxes(-1, -2).reshape(shape)


def _interleaved(y: np.ndarray) -> np.ndarray:
    pairs = y.reshape(*y.shape[:-1], 2, y.shape[-1] // 2).swapaxes(-1, -2)
    return pairs.reshape(_join(y.shape)).T


# As TRANSPOSED_HEADS. Theirs rotates dimension 2i of a head with 2i + 1, and ours rotates i with i + H/2 (llama2.c).
INTERLEAVED_HEADS = Form(lambda shape: _join(shape)[::-1], _interleaved, _halves)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of theirs: one of ours, or several of ours side by side along an axis of theirs.

    form  how each of them lies in it
    ours  their paths in our parameters: `layers/attention/wq_DNH` without the first name in the table of a layer
    axis  the axis of theirs along which several lie side by side
    """

    form: Form
    ours: tuple[str, ...]
    axis: int = 0


def stored(form: Form, *ours: str, axis: int = 0) -> Stored:
    """A line of a name table, see `Stored`."""
    return Stored(form, ours, axis)
