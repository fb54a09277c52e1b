"""Makes packing plans from the lengths of documents: cuts documents into pieces and packs the pieces into rows.

Pieces are packed whole, by `best_fit` if there is one stream of tokens and by `two_streams` if there are two. The
order of pieces follows from integer hashes (`order`), so that the same lengths and seed give the same plan everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from llmjax.data.checksums import DamagedError
from llmjax.data.packing.best_fit import pack_best_fit
from llmjax.data.packing.order import hash_integers, stable_argsort
from llmjax.data.packing.plan import PackingPlan, load_plan, save_plan
from llmjax.data.packing.two_streams import FORMAT as TWO_STREAMS_FORMAT
from llmjax.data.packing.two_streams import SourceStream, pack_two_streams
from llmjax.escapes import complain

# The version of the saved plan and of the algorithm. It is part of the fingerprint: raising it discards cached plans.
FORMAT = 1
# The same for the cuts at borders.
BORDERS_FORMAT = 1
# The number of a document -> the tokens at which it may be cut, ascending.
Borders = Callable[[int], np.ndarray]


def plan_packing(
    lengths: np.ndarray,
    doc_ids: np.ndarray,
    seq_len: int,
    seed: int,
    source: SourceStream | None = None,
    borders: Borders | None = None,
) -> PackingPlan:
    """Packs the documents `doc_ids` into rows of `seq_len` positions.

    Args:
      lengths: int [documents], the tokens of every document of the store, bos and eos included.
      doc_ids: int [n], the documents to pack. A document of fewer than two tokens predicts nothing and is left out.
      seq_len: T, the positions in a row.
      seed: decides which pieces of equal length share a row, and the order of the pieces within a row.
      source: the second stream, if there is one. No document is cut then, and `UserError` is raised if a document
        does not fit into a row.
      borders: where documents that do not fit into a row are cut; None cuts at multiples of seq_len.
    """
    doc_ids = np.asarray(doc_ids, np.int64)
    predictions = np.asarray(lengths, np.int64)[doc_ids] - 1
    fingerprint = _fingerprint(predictions, doc_ids, seq_len, seed, source, borders)
    if borders is None:
        docs, starts, sizes = _cut_into_pieces(doc_ids, predictions, seq_len)
    else:
        docs, starts, sizes = _cut_at_borders(doc_ids, predictions, seq_len, borders)
    if source is not None:
        source.check(doc_ids, predictions, seq_len)

    # One shuffle by hash is enough: every later sort is stable, so pieces of equal length and the pieces of one row
    # keep their shuffled order.
    shuffled = np.argsort(hash_integers(np.arange(len(docs)), seed), kind="stable")
    docs, starts, sizes = docs[shuffled], starts[shuffled], sizes[shuffled]
    if source is None:
        rows, num_rows = pack_best_fit(sizes, seq_len)
    else:
        rows, num_rows = pack_two_streams(sizes, source.lengths[docs], seq_len, source.row_length)
    by_row = stable_argsort(rows)
    # Row r begins where the pieces of rows 0 to r - 1 end.
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


def _cut_into_pieces(
    doc_ids: np.ndarray, predictions: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents with this many predictions, int64 [n], at multiples of seq_len.

    Returns the document, the first token and the length of each piece, int64 [pieces] each.
    """
    # Rounded up; a document of 0 or 1 tokens has no prediction and no piece.
    pieces = -(-np.maximum(predictions, 0) // seq_len)
    # Subtracting the number of the document's first piece numbers the pieces within each document.
    first = np.cumsum(pieces) - pieces
    starts = (np.arange(pieces.sum()) - np.repeat(first, pieces)) * seq_len
    sizes = np.minimum(np.repeat(predictions, pieces) - starts, seq_len)
    return np.repeat(doc_ids, pieces), starts, sizes


def _cut_at_borders(
    doc_ids: np.ndarray, predictions: np.ndarray, seq_len: int, borders: Borders
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same as `_cut_into_pieces`, with cuts at borders where a document is too long.

    Each piece takes as much as fits up to a border. Where none lies within a row, it takes the whole row.
    """
    long = predictions > seq_len
    whole = np.flatnonzero(~long & (predictions > 0))
    order, docs, starts, sizes = (
        [whole],
        [doc_ids[whole]],
        [np.zeros(len(whole), np.int64)],
        [predictions[whole]],
    )
    for i in np.flatnonzero(long).tolist():
        cuts = [0]
        own = borders(int(doc_ids[i])).astype(np.int64)
        while predictions[i] - cuts[-1] > seq_len:
            fitting = own[(own > cuts[-1]) & (own <= cuts[-1] + seq_len)]
            cuts.append(int(fitting[-1]) if len(fitting) else cuts[-1] + seq_len)
        order.append(np.full(len(cuts), i))
        docs.append(np.full(len(cuts), doc_ids[i]))
        starts.append(np.array(cuts, np.int64))
        sizes.append(np.diff([*cuts, int(predictions[i])]))
    by_document = np.argsort(np.concatenate(order), kind="stable")
    return tuple(np.concatenate(parts)[by_document] for parts in (docs, starts, sizes))  # type: ignore[return-value]


def _fingerprint(
    predictions: np.ndarray,
    doc_ids: np.ndarray,
    seq_len: int,
    seed: int,
    source: SourceStream | None,
    borders: Borders | None,
) -> str:
    """A hex digest of everything that decides the plan. It names the plan's folder in the cache."""
    digest = hashlib.blake2b(json.dumps([FORMAT, seq_len, seed]).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(predictions).data)
    digest.update(np.ascontiguousarray(doc_ids).data)
    # Nothing is added if there is one stream, so that such plans keep their fingerprints.
    if source is not None:
        digest.update(json.dumps([TWO_STREAMS_FORMAT, source.row_length]).encode())
        digest.update(np.ascontiguousarray(source.lengths[doc_ids], "<i8").data)
    if borders is not None:
        digest.update(json.dumps(["borders", BORDERS_FORMAT]).encode())
        for doc in doc_ids[predictions > seq_len].tolist():
            own = borders(doc)
            digest.update(len(own).to_bytes(8, "little") + np.ascontiguousarray(own, "<i8").tobytes())
    return digest.hexdigest()


def cached_plan(
    lengths: np.ndarray,
    doc_ids: np.ndarray,
    seq_len: int,
    seed: int,
    cache_dir: str | os.PathLike,
    report: Callable[[str], None] = complain,
    source: SourceStream | None = None,
    borders: Borders | None = None,
) -> PackingPlan:
    """Returns the plan of `plan_packing` from `cache_dir`, and makes and saves it there if it is missing.

    The arrays of the plan are memory-mapped in both cases. A damaged plan is made again, and `report` is called with
    one sentence about it.
    """
    doc_ids = np.asarray(doc_ids, np.int64)
    predictions = np.asarray(lengths, np.int64)[doc_ids] - 1
    folder = (
        pathlib.Path(cache_dir) / f"plan-{_fingerprint(predictions, doc_ids, seq_len, seed, source, borders)}"
    )
    # lexists, because a broken link in place of the folder counts as damage and must be replaced.
    if os.path.lexists(folder):
        try:
            return load_plan(folder)
        except DamagedError as error:
            report(f"{error.reason}; it is made again")
    save_plan(plan_packing(lengths, doc_ids, seq_len, seed, source, borders), folder)
    return load_plan(folder)
