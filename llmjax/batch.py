"""The fields of a batch, each with its dimensions and dtype, declared once for the host and the devices.

The host makes batches without importing jax. `llmjax.types` registers `Batch` with jax; code that runs on devices
imports it from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a batch.

    dims      the logical axis names of its dimensions, see `parallel/rules.py`
    dtype     int32 or float32
    optional  whether a batch may lack it
    """

    dims: tuple[str, ...]
    dtype: str = "int32"
    optional: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the field for these sizes of the dimensions."""
        return tuple(sizes[dim] for dim in self.dims)


def _field(*dims: str, dtype: str = "int32", optional: bool = False) -> Any:
    metadata = {"field": Field(dims, dtype, optional)}
    # A dataclass wants fields with defaults last: optional ones default to None.
    return (
        dataclasses.field(default=None, metadata=metadata)
        if optional
        else dataclasses.field(metadata=metadata)
    )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences: B rows of T positions each.

    The place of a token in the arrays has no meaning, so the tokens of a row may lie in any order.

    tokens     the ids that the model reads
    targets    the ids that it learns to predict, one per position
    weights    the loss weight of each target; 0 on padding
    segments   the document within the row, counted from 1; 0 is padding
    positions  the position within the document, counted from 0
    index      the packed sequence number. Together with the column, it determines random draws such as dropout
    columns    the column of the packed sequence that each token comes from; None if tokens lie in their order

    labels     the class of the document of each token, for tasks that have classes

    A task with a second stream, such as translation, has S positions of it in each row:

    source_tokens     the ids of the second stream
    source_segments   the document of each source token, numbered as in `segments`
    source_positions  the position within the source text of the document, counted from 0
    """

    tokens: Any = _field("batch", "length")
    targets: Any = _field("batch", "length")
    weights: Any = _field("batch", "length", dtype="float32")
    segments: Any = _field("batch", "length")
    positions: Any = _field("batch", "length")
    index: Any = _field("batch")
    columns: Any = _field("batch", "length", optional=True)
    labels: Any = _field("batch", "length", optional=True)
    source_tokens: Any = _field("batch", "source_length", optional=True)
    source_segments: Any = _field("batch", "source_length", optional=True)
    source_positions: Any = _field("batch", "source_length", optional=True)


FIELDS: dict[str, Field] = {field.name: field.metadata["field"] for field in dataclasses.fields(Batch)}


def along(dim: str) -> tuple[str, ...]:
    """The names of the fields with the dimension `dim`."""
    return tuple(name for name, field in FIELDS.items() if dim in field.dims)


def empty_arrays(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """All fields that are not optional, filled with 0, which means padding."""
    return {
        name: np.zeros(field.shape(sizes), field.dtype)
        for name, field in FIELDS.items()
        if not field.optional
    }
