"""Which token of a packed row lies on which device of the mesh axis `seq`: decided on the host, once for each row.

Shard d of n is the d-th part of the row's columns. Masks read segments and positions, which travel with the tokens, so
that any order of the columns gives the same loss; what it decides is how even the work of ring attention is, and how
far keys have to travel.

    contiguous  the row as it is: a document longer than a shard has its last shard do the most
    zigzag      2 n chunks, of which shard d has d and 2 n - 1 - d: even for one long document (Llama 3, 2024,
                arXiv 2407.21783)
    striped     shard d has every n-th token: even for one long document (Brandon et al. 2023, "Striped Attention",
                arXiv 2311.09431), but every block of queries needs every block of keys before it
    documents   whole documents on one shard where that is even, long ones over few neighbours (`spread`)

Within a shard the tokens ascend by (segment, position): a block of them then spans what it holds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from llmjax.batch import along
from llmjax.data.layout.by_documents import spread
from llmjax.errors import UserError

Arrays = dict[str, np.ndarray]  # the fields of llmjax.types.Batch

BLOCK = 256  # tokens that attention takes at a time, about


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How rows lie on the `shards` devices of a sequence.

    name    contiguous | zigzag | striped | documents
    shards  n, the size of the mesh axis `seq`
    block   tokens that attention takes at a time; `documents` cuts at multiples of it where it can
    """

    name: str = "contiguous"
    shards: int = 1
    block: int = BLOCK

    @property
    def moves(self) -> bool:
        """Whether any token moves."""
        return LAYOUTS[self.name].moves and self.shards > 1

    def check(self, seq_len: int) -> None:
        """Raises UserError where rows of `seq_len` tokens cannot be laid out."""
        parts = LAYOUTS[self.name].parts
        if self.moves and seq_len % (parts * self.shards):
            times = f"{parts} x " if parts > 1 else ""
            raise UserError(
                f"data.seq_len={seq_len} is not divisible by {times}mesh.seq={self.shards}, which "
                f"mesh.layout={self.name!r} needs; change one of them"
            )

    def order(self, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """The columns and the segments of a row that holds pieces of these lengths [pieces], one after the other.

        Returns:
          int64 [T]: column j of the laid out row holds column order[j] of the row.
          int32 [pieces + 1]: the segment that each segment of the row becomes, padding (0) included.
        """
        return LAYOUTS[self.name].order(np.asarray(lengths, np.int64), seq_len, self)


def lay_out(arrays: Arrays, layout: RowLayout) -> Arrays:
    """Packed rows [B, T] with their columns in the order of `layout`; `columns` says which column each one was.

    Segments may be renamed, so that they ascend within a shard. Rows that do not move are given back as they are.
    """
    if not layout.moves:
        return arrays
    B, T = arrays["tokens"].shape
    moved = [name for name in along("length") if name in arrays]
    laid = arrays | {name: np.empty_like(arrays[name]) for name in moved}
    columns = np.empty((B, T), np.int32)
    for row, segments in enumerate(arrays["segments"]):
        columns[row], segment_of = layout.order(np.bincount(segments)[1:], T)
        for name in moved:
            laid[name][row] = arrays[name][row, columns[row]]
        laid["segments"][row] = segment_of[laid["segments"][row]]
    return laid | {"columns": columns}


def _in_order(columns):
    """A layout that takes no notice of documents, from (seq_len, shards) -> order."""
    columns = functools.lru_cache(maxsize=4)(columns)

    def order(lengths: np.ndarray, seq_len: int, layout: RowLayout) -> tuple[np.ndarray, np.ndarray]:
        return columns(seq_len, layout.shards), np.arange(len(lengths) + 1, dtype=np.int32)

    return order


def _contiguous(seq_len: int, shards: int) -> np.ndarray:
    return np.arange(seq_len)


def _zigzag(seq_len: int, shards: int) -> np.ndarray:
    chunks = np.arange(seq_len).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def _striped(seq_len: int, shards: int) -> np.ndarray:
    return np.arange(seq_len).reshape(-1, shards).T.reshape(-1)


def _documents(lengths: np.ndarray, seq_len: int, layout: RowLayout) -> tuple[np.ndarray, np.ndarray]:
    cuts, places = spread(lengths, seq_len, layout.shards, layout.block)
    starts = np.cumsum(lengths) - lengths
    sizes = cuts.stop - cuts.start
    padding = seq_len // layout.shards - np.bincount(cuts.shard, sizes, minlength=layout.shards).astype(
        np.int64
    )
    # Padding is behind the documents, in the row and in each shard.
    first = np.concatenate([starts[cuts.document] + cuts.start, lengths.sum() + np.cumsum(padding) - padding])
    behind = np.argsort(np.concatenate([cuts.shard, np.arange(layout.shards)]), kind="stable")
    first, sizes = first[behind], np.concatenate([sizes, padding])[behind]
    order = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(seq_len)
    return order, np.concatenate([[0], places + 1]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """One value of `mesh.layout`.

    order  (lengths of the pieces, seq_len, the RowLayout) -> what `RowLayout.order` returns
    parts  equal ones that each shard takes of a row: with the shards they must divide it
    moves  tokens leave their columns
    """

    order: Callable[[np.ndarray, int, RowLayout], tuple[np.ndarray, np.ndarray]]
    parts: int = 1
    moves: bool = True


LAYOUTS = {
    "contiguous": Arrangement(_in_order(_contiguous), moves=False),
    "zigzag": Arrangement(_in_order(_zigzag), parts=2),
    "striped": Arrangement(_in_order(_striped)),
    "documents": Arrangement(_documents),
}
