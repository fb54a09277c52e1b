"""Decides which token of a packed row lies on which device of the mesh axis `seq`, once for each row, on the host.

The columns of a row are divided into n equal parts, called shards; device d holds shard d. A layout is an order of the
columns. Masks read segments and positions, which move with the tokens, so every layout gives the same loss. A
layout decides how evenly the work of ring attention is shared out, and how far keys travel.

    contiguous  keeps the row as it is. The last shard of a long document has the most work
    zigzag      cuts the row into 2 n chunks, of which shard d holds chunks d and 2 n - 1 - d. The work is even for one
                long document (Llama 3, 2024, arXiv 2407.21783)
    striped     gives shard d every n-th token. The work is even for one long document, but every block of queries needs
                every earlier block of keys (Brandon et al. 2023, "Striped Attention", arXiv 2311.09431)
    documents   keeps short documents whole on one shard and splits long ones over few neighbours (`by_documents`)

Within a shard the tokens ascend by (segment, position). A block of neighbouring tokens then covers a short range of
documents and positions, and attention skips blocks whose ranges do not meet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from llmjax.batch import along
from llmjax.data.layout.by_documents import assign_documents
from llmjax.errors import UserError

# The fields of a `llmjax.batch.Batch` as numpy arrays, by name.
Arrays = dict[str, np.ndarray]

# The default for `RowLayout.block`: about the number of tokens in a block of attention.
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How the tokens of a row are laid out over the devices that share it.

    name    a key of `LAYOUTS`: contiguous, zigzag, striped or documents
    shards  n, the size of the mesh axis `seq`
    block   the tokens in a block of attention. The layout `documents` cuts at multiples of it where possible
    """

    name: str = "contiguous"
    shards: int = 1
    block: int = BLOCK

    @property
    def moves(self) -> bool:
        """Whether this layout moves any token to another column."""
        return LAYOUTS[self.name].moves and self.shards > 1

    def check(self, seq_len: int) -> None:
        """Raises UserError if rows of `seq_len` tokens cannot be divided as this layout requires."""
        parts = LAYOUTS[self.name].parts
        if self.moves and seq_len % (parts * self.shards):
            times = f"{parts} x " if parts > 1 else ""
            raise UserError(
                f"data.seq_len={seq_len} is not divisible by {times}mesh.seq={self.shards}, which "
                f"mesh.layout={self.name!r} needs; change one of them"
            )

    def order(self, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Lays out one row of `seq_len` positions.

        Args:
          lengths: int [pieces], the lengths of the row's pieces, which lie one after the other before the padding.
          seq_len: T, the positions in the row.

        Returns:
          order: int64 [T]. Column j of the laid out row holds column order[j] of the packed row.
          segment_of: int32 [pieces + 1], the new segment of each segment of the row. Padding, segment 0, keeps 0.
        """
        return LAYOUTS[self.name].order(np.asarray(lengths, np.int64), seq_len, self)


def lay_out(arrays: Arrays, layout: RowLayout) -> Arrays:
    """Puts the columns of packed rows [B, T] into the order of `layout`.

    The result has one more field, `columns`, int32 [B, T]: the column of the packed row that each token comes from.
    Segments may be renumbered, so that they ascend within each shard. Returns `arrays` itself if no token moves.
    """
    if not layout.moves:
        return arrays
    B, T = arrays["tokens"].shape
    moved = [name for name in along("length") if name in arrays]
    laid = arrays | {name: np.empty_like(arrays[name]) for name in moved}
    if "source_segments" in arrays:
        laid["source_segments"] = np.empty_like(arrays["source_segments"])
    columns = np.empty((B, T), np.int32)
    for row, segments in enumerate(arrays["segments"]):
        # The length of a piece is the number of positions with its segment; entry 0 counts the padding.
        columns[row], segment_of = layout.order(np.bincount(segments)[1:], T)
        for name in moved:
            laid[name][row] = arrays[name][row, columns[row]]
        laid["segments"][row] = segment_of[laid["segments"][row]]
        if "source_segments" in arrays:
            # The source of a document stays where it is, and gets the new number of its document.
            laid["source_segments"][row] = segment_of[arrays["source_segments"][row]]
    return laid | {"columns": columns}


def _ignoring_documents(columns):
    """Makes `Arrangement.order` from a function of (seq_len, shards) that returns an order of columns, int64 [T]."""
    columns = functools.lru_cache(maxsize=4)(columns)

    def order(lengths: np.ndarray, seq_len: int, layout: RowLayout) -> tuple[np.ndarray, np.ndarray]:
        return columns(seq_len, layout.shards), np.arange(len(lengths) + 1, dtype=np.int32)

    return order


def _contiguous(seq_len: int, shards: int) -> np.ndarray:
    return np.arange(seq_len)


def _zigzag(seq_len: int, shards: int) -> np.ndarray:
    chunks = np.arange(seq_len).reshape(2 * shards, -1)
    # The second slice is the last half of the chunks, in reverse.
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def _striped(seq_len: int, shards: int) -> np.ndarray:
    # Row d of the transpose holds columns d, d + shards, d + 2 * shards and so on.
    return np.arange(seq_len).reshape(-1, shards).T.reshape(-1)


def _documents(lengths: np.ndarray, seq_len: int, layout: RowLayout) -> tuple[np.ndarray, np.ndarray]:
    cuts, ranks = assign_documents(lengths, seq_len, layout.shards, layout.block)
    starts = np.cumsum(lengths) - lengths
    sizes = cuts.stop - cuts.start
    padding = seq_len // layout.shards - np.bincount(cuts.shard, sizes, minlength=layout.shards).astype(
        np.int64
    )
    # Padding follows the documents, in the packed row and in each shard. It forms one more run of columns per shard.
    first = np.concatenate([starts[cuts.document] + cuts.start, lengths.sum() + np.cumsum(padding) - padding])
    # The stable sort keeps the runs of a shard in their order, with the padding last.
    by_shard = np.argsort(np.concatenate([cuts.shard, np.arange(layout.shards)]), kind="stable")
    first, sizes = first[by_shard], np.concatenate([sizes, padding])[by_shard]
    # Each run counts up from its first column: np.arange counts over all runs, the repeated term shifts it.
    order = np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(seq_len)
    return order, np.concatenate([[0], ranks + 1]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """The implementation of one value of `mesh.layout`.

    order  a function of (lengths of the pieces, seq_len, RowLayout) that returns the result of `RowLayout.order`
    parts  into how many equal parts each shard's tokens are divided; parts * shards must divide seq_len
    moves  whether tokens move to other columns
    """

    order: Callable[[np.ndarray, int, RowLayout], tuple[np.ndarray, np.ndarray]]
    parts: int = 1
    moves: bool = True


# The values of `mesh.layout` besides "auto".
LAYOUTS = {
    "contiguous": Arrangement(_ignoring_documents(_contiguous), moves=False),
    "zigzag": Arrangement(_ignoring_documents(_zigzag), parts=2),
    "striped": Arrangement(_ignoring_documents(_striped)),
    "documents": Arrangement(_documents),
}
