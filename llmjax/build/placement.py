"""How batches reach the devices: shapes and shardings of their fields, and the feed that makes and places them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding

from llmjax.batch import FIELDS
from llmjax.data.layout.layout import RowLayout
from llmjax.data.pipeline import Batches, PackedSequences, make_batches
from llmjax.parallel.hosts import local_batch_rows, make_global
from llmjax.parallel.rules import Layout
from llmjax.train.steering.batch_schedule import BatchArithmetic
from llmjax.types import Batch


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the batches of a program lie on its devices, and how they are made and brought there.

    layout      the mesh, with its rules
    batch       the sizes of a micro-batch
    row_layout  which token of a sequence lies on which device
    lead        the leading dimensions of what a call of the step takes, see `Engine.lead`
    prefetch    micro-batches made ahead
    optional    the fields of `Batch` that batches have besides those that all have
    source_len  positions of the second stream, where the task has one
    """

    layout: Layout
    batch: BatchArithmetic
    row_layout: RowLayout
    lead: tuple[int, ...]
    prefetch: int
    optional: tuple[str, ...] = ()
    source_len: int = 0

    def sharding(self, field: str, *lead: None) -> NamedSharding:
        """How a field of `Batch` lies on the mesh, after leading dimensions that are not split."""
        return self.layout.sharding(*lead, *FIELDS[field].dims)

    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of what a call of the training step takes."""
        sizes = {
            "batch": self.batch.micro_batch_size,
            "length": self.batch.seq_len,
            "source_length": self.source_len,
        }
        arrays = {
            name: jax.ShapeDtypeStruct(
                (*self.lead, *field.shape(sizes)),
                field.dtype,
                sharding=self.sharding(name, *[None] * len(self.lead)),
            )
            for name, field in FIELDS.items()
            if not field.optional or name in self.optional
        }
        return Batch(**arrays)

    def place(self, arrays: Mapping[str, np.ndarray]) -> Batch:
        """A batch on the devices, of which every process has made all rows."""
        rows = local_batch_rows(self.sharding("tokens"), len(arrays["tokens"]))
        fields = {}
        for name, array in arrays.items():
            fields[name] = make_global(self.sharding(name), array.shape, rows, array[rows])
        return Batch(**fields)

    def batches(
        self,
        source: PackedSequences,
        *,
        start: int = 0,
        stop: int | None = None,
        batch_size: int = 0,
        length: int = 0,
    ) -> Feed:
        """Micro-batches on the devices, from sequence number `start` on; this process makes only the rows it needs.

        `batch_size` sequences each, 0: a micro-batch; cut into rows of `length`, 0: whole.
        """
        batch_size = batch_size or self.batch.micro_batch_size
        pieces = self.batch.seq_len // (length or self.batch.seq_len)
        rows = local_batch_rows(self.sharding("tokens"), batch_size)
        host = make_batches(
            source,
            start=start,
            stop=stop,
            batch_size=batch_size,
            local_rows=rows,
            prefetch=self.prefetch,
            layout=self.row_layout,
            length=length,
        )
        # The pieces of a row follow each other, so they lie on the devices that the row would lie on.
        rows = (rows[:, None] * pieces + np.arange(pieces)).reshape(-1)
        return Feed(self, host, batch_size * pieces, rows)


@dataclasses.dataclass(frozen=True)
class Feed:
    """An iterator of `Batch` on the devices over one of numpy arrays; to be closed."""

    placement: Placement
    host: Batches
    batch_size: int
    rows: np.ndarray

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._place(next(self.host))

    def take(self, count: int) -> Batch:
        """`count` micro-batches in one, [K, B, T], for a fused step; what is left of K is 0."""
        micro_batches = [next(self.host) for _ in range(count)]
        shape = self.placement.lead
        arrays = {}
        for name, first in micro_batches[0].items():
            arrays[name] = np.zeros((*shape, *first.shape), first.dtype)
            np.stack([arrays_of_one[name] for arrays_of_one in micro_batches], out=arrays[name][:count])
        return self._place(arrays, *shape)

    def _place(self, arrays: dict[str, np.ndarray], *lead: int) -> Batch:
        fields = {}
        for name, array in arrays.items():
            sharding = self.placement.sharding(name, *[None] * len(lead))
            shape = (*lead, self.batch_size, *array.shape[len(lead) + 1 :])
            fields[name] = make_global(sharding, shape, self.rows, array, axis=len(lead))
        return Batch(**fields)

    def close(self) -> None:
        """Ends the thread that makes batches."""
        self.host.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
