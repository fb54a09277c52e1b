"""Packing: which pieces of which documents share a row of T positions, and in which order the rows are read.

A document of n tokens (bos and eos included) has n - 1 predictions: it reads tokens[:-1] and predicts
tokens[1:]. It is cut only if it has more than T predictions, and then at multiples of T with its continuation
kept. A *piece* is (document, start, length <= T), counted in predictions; it reads length + 1 tokens, so that
every target of every document is predicted exactly once and loss weights are exact.

Pieces are packed whole, by best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830): each piece, longest first, goes into the fullest row that still has room for it.
Only lengths matter for that, so it is done on the histogram of lengths, a run of equal rows at a time: the
work in Python grows with the number of different lengths, not of documents.

Nothing here draws from a random generator of a library: the order is made of integer hashes, so that the same
(lengths, seed) give the same plan with every version of numpy and on every machine.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from llmjax.data.checksums import DamagedError, verify, write_checksums
from llmjax.data.packing.two_streams import FORMAT as TWO_STREAMS_FORMAT
from llmjax.data.packing.two_streams import Source, pack_two_streams
from llmjax.errors import UserError
from llmjax.escapes import complain
from llmjax.files import new_folder, write_atomically

FORMAT = 1  # of the saved plan and of the algorithm; part of the fingerprint
ARRAYS = ("docs", "starts", "lengths", "offsets")
SOURCE = "source_lengths"  # the array that a plan over two streams has besides


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """Pieces in row order: row r holds the pieces offsets[r] to offsets[r + 1], left to right.

    docs           int64 [pieces], document in the store
    starts         int64 [pieces], first token read; a multiple of seq_len
    lengths        int32 [pieces], predictions, 1 to seq_len; length + 1 tokens are read
    offsets        int64 [rows + 1], first piece of each row
    seq_len        T, positions in a row
    source_lengths int32 [pieces], tokens of the second stream; None where there is one stream
    source_len     S, positions of the second stream in a row; 0 where there is one stream
    num_documents  documents with at least one piece
    num_tokens     predictions, the sum of `lengths`
    attended       keys that a token attends to on average under the causal mask within its piece:
                   sum L (L + 1) / 2 over sum L; in a row of one document (T + 1) / 2
    fingerprint    hex digest of all that the plan is a function of
    folder         where the arrays are mapped from; "" if they lie in memory
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
        """The share of positions that predict something; the rest is padding."""
        return self.num_tokens / max(1, self.num_rows * self.seq_len)

    def attended_in(self, length: int) -> float:
        """`attended` where the rows are cut into rows of `length`."""
        first_of_row = np.repeat(self.offsets[:-1], np.diff(self.offsets))
        stops = np.cumsum(self.lengths, dtype=np.int64)
        starts = stops - self.lengths
        starts -= starts[first_of_row]
        first = np.minimum(self.lengths, length - starts % length)
        whole, rest = np.divmod(self.lengths - first, length)
        keys = (first * (first + 1) + rest * (rest + 1)) // 2 + whole * (length * (length + 1) // 2)
        return float(keys.sum() / max(1, self.num_tokens))

    def __reduce__(self):
        """A mapped plan travels to other processes as its folder, not as its arrays."""
        if self.folder:
            return load_plan, (self.folder,)
        return PackingPlan, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def plan_packing(
    lengths: np.ndarray, doc_ids: np.ndarray, seq_len: int, seed: int, source: Source | None = None
) -> PackingPlan:
    """Packs the documents `doc_ids` into rows of `seq_len` positions.

    Args:
      lengths: int [documents], tokens of every document of the store, bos and eos included.
      doc_ids: int [n], the documents to pack; a document of fewer than two tokens has nothing to predict and is
        left out.
      seq_len: T, positions in a row.
      seed: decides which pieces of equal length meet in a row, and their order within it.
      source: the second stream, of which no document may be cut: `UserError` where one does not fit into a row.
    """
    doc_ids = np.asarray(doc_ids, np.int64)
    predictions = np.asarray(lengths, np.int64)[doc_ids] - 1
    fingerprint = _fingerprint(predictions, doc_ids, seq_len, seed, source)
    docs, starts, sizes = _cut(doc_ids, predictions, seq_len)
    if source is not None:
        source.check(doc_ids, predictions, seq_len)

    # Shuffle once; every later sort is stable, so pieces of equal length stay shuffled, and so do the pieces of a row.
    shuffled = np.argsort(hash_integers(np.arange(len(docs)), seed), kind="stable")
    docs, starts, sizes = docs[shuffled], starts[shuffled], sizes[shuffled]
    if source is None:
        longest_first = _stable_order(seq_len - sizes)
        runs, num_rows = _best_fit_decreasing(np.bincount(sizes, minlength=seq_len + 1))
        rows = np.empty(len(docs), np.int64)
        rows[longest_first] = _rows_of_runs(runs)
    else:
        rows, num_rows = pack_two_streams(sizes, source.lengths[docs], seq_len, source.row_length)
    by_row = _stable_order(rows)
    offsets = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=num_rows), out=offsets[1:])
    num_tokens = int(sizes.sum())
    docs = docs[by_row]
    return PackingPlan(
        docs=docs,
        starts=starts[by_row],
        lengths=sizes[by_row].astype(np.int32),
        offsets=offsets,
        seq_len=seq_len,
        num_documents=int(np.count_nonzero(predictions > 0)),
        num_tokens=num_tokens,
        attended=float((sizes * (sizes + 1) // 2).sum() / max(1, num_tokens)),
        fingerprint=fingerprint,
        source_lengths=None if source is None else source.lengths[docs].astype(np.int32),
        source_len=0 if source is None else source.row_length,
    )


def _cut(
    doc_ids: np.ndarray, predictions: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents -> (document, start, length) of their pieces, int64 [pieces] each."""
    pieces = -(-np.maximum(predictions, 0) // seq_len)
    first = np.cumsum(pieces) - pieces
    starts = (np.arange(pieces.sum()) - np.repeat(first, pieces)) * seq_len
    sizes = np.minimum(np.repeat(predictions, pieces) - starts, seq_len)
    return np.repeat(doc_ids, pieces), starts, sizes


def _best_fit_decreasing(histogram: np.ndarray) -> tuple[np.ndarray, int]:
    """Best-fit decreasing on counts[length], exact, in O(different lengths) steps.

    Among rows with the same room any is the best fit, and after a row took a piece that leaves room for
    another of the same length it is the best fit again. So all rows with the same room are filled alike,
    `copies` pieces each.

    Returns:
      runs int64 [runs, 3] of (first row, number of rows, copies), to be filled in turn with the pieces,
      longest first; and the number of rows.
    """
    seq_len = len(histogram) - 1
    present = np.flatnonzero(histogram)
    if not len(present):
        return np.zeros((0, 3), np.int64), 0
    shortest = int(present[0])
    rooms: list[int] = []  # the different amounts of room among open rows, ascending
    open_rows: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)  # room -> ranges of rows

    def put(room: int, first: int, stop: int) -> None:
        if first < stop and room >= shortest:
            if not open_rows[room]:
                bisect.insort(rooms, room)
            open_rows[room].append((first, stop))

    runs, num_rows = [], 0
    for length in reversed(present.tolist()):
        left = int(histogram[length])
        while left:
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                more = -(-left // (seq_len // length))
                put(seq_len, num_rows, num_rows + more)
                num_rows += more
            room = rooms[at]
            first, stop = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[at]
            copies = room // length
            if left < copies:  # the last row of this length takes fewer
                copies = left
            filled = first + min(stop - first, left // copies)
            runs.append((first, filled - first, copies))
            left -= (filled - first) * copies
            put(room - copies * length, first, filled)
            put(room, filled, stop)
    return np.array(runs, np.int64), num_rows


def _rows_of_runs(runs: np.ndarray) -> np.ndarray:
    """runs [runs, 3] -> int64 [pieces], the row of each piece, longest piece first."""
    first, count, copies = runs.T
    rows = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
    return np.repeat(rows, np.repeat(copies, count))


def _stable_order(values: np.ndarray) -> np.ndarray:
    """np.argsort(values, kind="stable") of non-negative integers, 16 bits at a time, where numpy counts."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    for shift in range(16, int(values.max(initial=0)).bit_length(), 16):
        order = order[np.argsort((values[order] >> shift).astype(np.uint16), kind="stable")]
    return order


def hash_integers(values: np.ndarray | Sequence[int], key: int) -> np.ndarray:
    """uint64 hashes of integers under an integer key, one to one in `values` (splitmix64's finaliser)."""
    x = np.array(values, np.uint64) ^ np.uint64((key + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `indices` [n] under a permutation of range(size) keyed by (seed, epoch), int64 [n].

    Random access, nothing stored: a Feistel network on the smallest square grid that holds range(size),
    walked until it lands inside again (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    side = np.uint64(math.isqrt(size - 1) + 1)
    keys = _round_keys(seed, epoch)
    images = _feistel(np.asarray(indices).astype(np.uint64), side, keys)
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], side, keys)
    return images.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(hash_integers(hash_integers(np.arange(4) + 4 * epoch, 0), seed).tolist())


def _feistel(values: np.ndarray, side: np.uint64, keys: tuple[int, ...]) -> np.ndarray:
    left, right = np.divmod(values, side)
    for key in keys:
        left, right = right, (left + hash_integers(right, key) % side) % side
    return left * side + right


def _fingerprint(
    predictions: np.ndarray, doc_ids: np.ndarray, seq_len: int, seed: int, source: Source | None
) -> str:
    digest = hashlib.blake2b(json.dumps([FORMAT, seq_len, seed]).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(predictions).data)
    digest.update(np.ascontiguousarray(doc_ids).data)
    if source is not None:
        digest.update(json.dumps([TWO_STREAMS_FORMAT, source.row_length]).encode())
        digest.update(np.ascontiguousarray(source.lengths[doc_ids], "<i8").data)
    return digest.hexdigest()


def cached_plan(
    lengths: np.ndarray,
    doc_ids: np.ndarray,
    seq_len: int,
    seed: int,
    cache_dir: str | os.PathLike,
    report: Callable[[str], None] = complain,
    source: Source | None = None,
) -> PackingPlan:
    """`plan_packing`, from `cache_dir` if it was made before; the arrays are memory-mapped either way.

    One that is damaged is made again, which `report` is told.
    """
    doc_ids = np.asarray(doc_ids, np.int64)
    predictions = np.asarray(lengths, np.int64)[doc_ids] - 1
    folder = pathlib.Path(cache_dir) / f"plan-{_fingerprint(predictions, doc_ids, seq_len, seed, source)}"
    if os.path.lexists(folder):
        try:
            return load_plan(folder)
        except DamagedError as error:
            report(f"{error.reason}; it is made again")
    save_plan(plan_packing(lengths, doc_ids, seq_len, seed, source), folder)
    return load_plan(folder)


def save_plan(plan: PackingPlan, folder: str | os.PathLike) -> None:
    """Writes the plan to a new `folder`, which appears whole or not at all; of two writers the first wins.

    What is there but damaged is replaced.
    """
    header = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in (*ARRAYS, SOURCE, "folder")
    }
    arrays = _arrays(plan.source_len)
    with new_folder(folder, _is_whole) as unfinished:
        for name in arrays:
            np.save(unfinished / f"{name}.npy", getattr(plan, name))
        write_atomically(unfinished / "plan.json", json.dumps(header, indent=1) + "\n")
        write_checksums(unfinished, ("plan.json", *(f"{name}.npy" for name in arrays)))


def _arrays(source_len: int) -> tuple[str, ...]:
    """The names of the arrays of a plan whose second stream has `source_len` positions in a row."""
    return (*ARRAYS, SOURCE) if source_len else ARRAYS


def _is_whole(folder: pathlib.Path) -> bool:
    try:
        load_plan(folder)
    except DamagedError:
        return False
    return True


def load_plan(folder: str | os.PathLike) -> PackingPlan:
    """The plan saved in `folder`, its arrays memory-mapped; `DamagedError` where it is not what was saved."""
    folder = pathlib.Path(folder)
    verify(folder, ["plan.json"], "packing plan")
    header = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    names = _arrays(header.get("source_len", 0))
    verify(folder, [f"{name}.npy" for name in names], "packing plan")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names}
    return PackingPlan(**arrays, **header, folder=str(folder))


def check_corpus(
    train: PackingPlan, held_out: PackingPlan, *, sequences_per_update: int, held_out_fraction: float
) -> None:
    """Raises UserError unless the documents fill an update and both sides of the held-out split have some."""
    if not train.num_rows and not held_out.num_rows:
        raise UserError("data.sources has no document of more than one token; add documents")
    if not train.num_rows:
        raise UserError(
            f"data.held_out_fraction={held_out_fraction} holds out all {held_out.num_documents} documents of "
            "data.sources and leaves none to train on; lower it or add documents"
        )
    if held_out_fraction > 0 and not held_out.num_rows:
        raise UserError(
            f"data.held_out_fraction={held_out_fraction} holds out none of the {train.num_documents} "
            "documents of data.sources; raise it, add documents, or set it to 0 to train without evaluation"
        )
    if train.num_rows < sequences_per_update:
        raise UserError(
            f"data.sources has {train.num_documents} documents to train on, which pack into {train.num_rows} "
            f"sequences of data.seq_len={train.seq_len}, fewer than the {sequences_per_update} of one "
            "update; add documents, or lower train.tokens_per_update or data.seq_len"
        )
