"""What a batch consists of: every field with its dimensions and its type, said once, for the host and the devices.

The host makes batches without jax. `llmjax.types` makes `Batch` known to jax, and whatever runs on devices imports it
from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a batch.

    dims      what its dimensions are: names of logical axes, see `parallel/rules.py`
    dtype     int32 or float32
    optional  whether a batch may lack it
    """

    dims: tuple[str, ...]
    dtype: str = "int32"
    optional: bool = False

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for these sizes of the dimensions."""
        return tuple(sizes[dim] for dim in self.dims)


def _field(*dims: str, dtype: str = "int32", optional: bool = False) -> Any:
    metadata = {"field": Field(dims, dtype, optional)}
    return (
        dataclasses.field(default=None, metadata=metadata)
        if optional
        else dataclasses.field(metadata=metadata)
    )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences: B of them, T positions each.

    Each token stands for itself: its place in the array means nothing, so that tokens may lie in any order.

    tokens     what the model reads
    targets    what it is to predict at each position
    weights    the loss weight of each target; 0 on padding
    segments   which document of its row a position belongs to, from 1; 0 is padding
    positions  the position within the document, from 0
    index      the packed sequence number, from which randomness (dropout) is drawn, with
    columns    the column of the packed sequence that a token comes from; None: the one where it lies

    A task with a second stream, such as translation, has S positions of it in each row:

    source_tokens     what the model reads besides
    source_segments   which document a source token belongs to; numbers as in `segments`
    source_positions  the position within the source of its document, from 0
    """

    tokens: Any = _field("batch", "length")
    targets: Any = _field("batch", "length")
    weights: Any = _field("batch", "length", dtype="float32")
    segments: Any = _field("batch", "length")
    positions: Any = _field("batch", "length")
    index: Any = _field("batch")
    columns: Any = _field("batch", "length", optional=True)
    source_tokens: Any = _field("batch", "source_length", optional=True)
    source_segments: Any = _field("batch", "source_length", optional=True)
    source_positions: Any = _field("batch", "source_length", optional=True)


FIELDS: dict[str, Field] = {field.name: field.metadata["field"] for field in dataclasses.fields(Batch)}


def along(dim: str) -> tuple[str, ...]:
    """The names of the fields that have the dimension `dim`."""
    return tuple(name for name, field in FIELDS.items() if dim in field.dims)


def empty_arrays(sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Every field that a batch must have, filled with 0: rows of padding."""
    return {
        name: np.zeros(field.shape(sizes), field.dtype)
        for name, field in FIELDS.items()
        if not field.optional
    }
