"""The packing plan: which pieces of which documents share a row of T positions; and how a plan is saved and loaded.

A document of n tokens, bos and eos included, has n - 1 predictions: the model reads tokens[:-1] and predicts
tokens[1:]. A document with more than T predictions is cut, at multiples of T or at borders such as the turns of a
conversation, and all its parts are kept. A *piece* is (document, start, length) with a length of at most T, counted in
predictions. It reads length + 1 tokens, so neighbouring pieces of a document share one token, and every target of every
document is predicted exactly once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import numpy as np

from llmjax.data.checksums import DamagedError, verify, write_checksums
from llmjax.errors import UserError
from llmjax.files import new_folder, write_atomically

# The arrays of every plan, each saved as NAME.npy.
ARRAYS = ("docs", "starts", "lengths", "offsets")
# The additional array of a plan with two streams.
SOURCE_ARRAY = "source_lengths"


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """Pieces in the order of the rows: row r holds pieces offsets[r] to offsets[r + 1] - 1, from left to right.

    docs           int64 [pieces], the number of each piece's document in the store
    starts         int64 [pieces], the first token that each piece reads
    lengths        int32 [pieces], the predictions of each piece, 1 to seq_len; the piece reads length + 1 tokens
    offsets        int64 [rows + 1], the first piece of each row, and the number of pieces
    seq_len        T, the positions in a row
    source_lengths int32 [pieces], the tokens of each piece in the second stream; None if there is one stream
    source_len     S, the positions of the second stream in a row; 0 if there is one stream
    num_documents  the number of documents with at least one piece
    num_tokens     the number of predictions, which is the sum of `lengths`
    attended       how many keys a query attends to on average, under the causal mask within its piece: the sum of
                   L (L + 1) / 2 over the pieces, divided by the sum of L. A row of one document has (T + 1) / 2
    fingerprint    a hex digest of everything that decides the plan
    folder         the folder from which the arrays are memory-mapped; "" if they are in memory
    """

    docs: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    seq_len: int
    num_documents: int
    num_tokens: int
    attended: float
    fingerprint: str
    folder: str = ""
    source_lengths: np.ndarray | None = None
    source_len: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_pieces(self) -> int:
        return len(self.docs)

    @property
    def efficiency(self) -> float:
        """The share of all positions that predict a token. The other positions are padding."""
        return self.num_tokens / max(1, self.num_rows * self.seq_len)

    def attended_in(self, length: int) -> float:
        """The value of `attended` after `shorten_rows.cut_rows` has cut every row into rows of `length` positions."""
        # The column of its row in which each piece starts.
        first_of_row = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        stops = np.cumsum(self.lengths, dtype=np.int64)
        starts = stops - self.lengths
        starts -= starts[first_of_row]
        # A cut piece has a first part up to the next cut, then `whole` parts of `length`, then a rest.
        first = np.minimum(self.lengths, length - starts % length)
        whole, rest = np.divmod(self.lengths - first, length)
        keys = (first * (first + 1) + rest * (rest + 1)) // 2 + whole * (length * (length + 1) // 2)
        return float(keys.sum() / max(1, self.num_tokens))

    def __reduce__(self):
        """Pickles a memory-mapped plan as the name of its folder, which other processes map again, without a copy."""
        if self.folder:
            return load_plan, (self.folder,)
        return PackingPlan, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def save_plan(plan: PackingPlan, folder: str | os.PathLike) -> None:
    """Writes the plan into a new `folder`, which appears complete or not at all.

    A complete plan in `folder`, written by another process, is kept. A damaged one is replaced.
    """
    header = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in (*ARRAYS, SOURCE_ARRAY, "folder")
    }
    arrays = _arrays(plan.source_len)
    # new_folder writes everything to disk (fsync) before it renames the folder.
    with new_folder(folder, _is_whole) as unfinished:
        for name in arrays:
            np.save(unfinished / f"{name}.npy", getattr(plan, name))
        write_atomically(unfinished / "plan.json", json.dumps(header, indent=1) + "\n")
        write_checksums(unfinished, ("plan.json", *(f"{name}.npy" for name in arrays)))


def _arrays(source_len: int) -> tuple[str, ...]:
    """The names of a plan's arrays; a plan with two streams has a positive `source_len` and one more array."""
    return (*ARRAYS, SOURCE_ARRAY) if source_len else ARRAYS


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether `folder` holds an undamaged plan."""
    try:
        load_plan(folder)
    except DamagedError:
        return False
    return True


def load_plan(folder: str | os.PathLike) -> PackingPlan:
    """Loads the plan in `folder` with memory-mapped arrays. Raises `DamagedError` if a checksum does not match."""
    folder = pathlib.Path(folder)
    # The header is checked before it is read, because it decides which arrays there are.
    verify(folder, ["plan.json"], "packing plan")
    header = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    names = _arrays(header.get("source_len", 0))
    verify(folder, [f"{name}.npy" for name in names], "packing plan")
    # A plain ndarray over the map, because slicing np.memmap itself is slow.
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names}
    return PackingPlan(**arrays, **header, folder=str(folder))


def check_corpus(
    train: PackingPlan,
    held_out: PackingPlan,
    *,
    sequences_per_update: int,
    held_out_fraction: float,
    held_out_sources: tuple[str, ...] = (),
    tails: bool = False,
    can_cut: bool = True,
) -> None:
    """Checks that the training rows fill one update and that the held-out split leaves no side empty.

    Raises UserError, which names the config key to change. The held-out side may be empty if `held_out_fraction` is 0.
    If there are `held_out_sources`, they are the held-out side, and the fraction is not looked at. `tails` says whether
    the end of each document is held out, and not whole documents, and `can_cut` whether it may be.
    """
    ends = ", or hold out the end of each with data.hold_out=tails" if can_cut else ""
    if not train.num_rows and not held_out.num_rows:
        raise UserError("data.sources has no document of more than one token; add documents")
    if held_out_sources and not (train.num_rows and held_out.num_rows):
        key = "data.held_out_sources" if train.num_rows else "data.sources"
        raise UserError(f"{key} has no document of more than one token; name sources with text")
    if not train.num_rows and tails:
        raise UserError(
            f"data.held_out_fraction={held_out_fraction} of the characters at the end of each of the "
            f"{held_out.num_documents} documents of data.sources leaves none to train on; lower it, or give longer "
            "documents"
        )
    if not train.num_rows:
        raise UserError(
            f"data.held_out_fraction={held_out_fraction} holds out all {held_out.num_documents} documents of "
            f"data.sources and leaves none to train on; lower it, or add documents{ends}"
        )
    if held_out_fraction > 0 and not held_out.num_rows:
        raise UserError(
            f"data.held_out_fraction={held_out_fraction} holds out none of the {train.num_documents} "
            f"documents of data.sources; raise it, add documents{ends}, or set it to 0 to train without evaluation"
        )
    if train.num_rows < sequences_per_update:
        raise UserError(
            f"data.sources has {train.num_documents} documents to train on, which pack into {train.num_rows} "
            f"sequences of data.seq_len={train.seq_len}, fewer than the {sequences_per_update} of one "
            "update; add documents, or lower train.tokens_per_update or data.seq_len"
        )
