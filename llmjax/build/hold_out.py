"""Which part of the text is held out: whole documents, the tail of each document, or files of its own."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from llmjax.data.examples.contract import Examples, can_be_cut
from llmjax.data.pipeline import DataConfig
from llmjax.data.sources.cutting import Cutting
from llmjax.data.sources.fingerprint import file_digest
from llmjax.data.sources.listing import Listing, SourceFile, search_sources
from llmjax.data.sources.reading import Reading
from llmjax.data.sources.records import detect_format, has_text
from llmjax.data.store.store import Store
from llmjax.errors import UserError

# Whole documents are a fair sample of the text if this many of them are held out on average ...
LEAST_DOCUMENTS = 4
# ... and the largest document is at most one part in this many of the text.
LARGEST_PART = 10

# What is held out, as `Corpus.hold_out` and the plan name it.
NOTHING, DOCUMENTS, TAILS, SOURCES = "nothing", "documents", "tails", "sources"


class MakeStore(Protocol):
    """Makes the store of the run's files, with documents cut as `cutting` says, or finds it in the cache."""

    def __call__(self, *, cutting: Cutting) -> Store: ...


def search_files(
    data: DataConfig,
    digest_of: Callable[[str], str] = file_digest,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Listing, tuple[SourceFile, ...]]:
    """The files of data.sources and of data.held_out_sources. Raises UserError if a file is of both.

    The other arguments are those of `search_sources`.
    """
    search = functools.partial(
        search_sources,
        follow_links=data.follow_links,
        has_text=functools.partial(has_text, reading=data.reading),
        digest_of=digest_of,
        progress=progress,
    )
    listing = search(data.sources)
    if not data.held_out_sources:
        return listing, ()
    found = search(data.held_out_sources, key="data.held_out_sources").files
    trained_on = {os.path.realpath(file.path) for file in listing.files}
    both = [file.path for file in found if os.path.realpath(file.path) in trained_on]
    if both:
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        raise UserError(
            f"data.held_out_sources name {both[0]!r}{more}, which data.sources name too: a file is trained on or held "
            "out, not both; take it out of one of them"
        )
    first = len(data.sources)
    return listing, tuple(dataclasses.replace(f, origin=first + f.origin, held_out=True) for f in found)


def make_store(
    data: DataConfig, examples: Examples, files: Sequence[SourceFile], make: MakeStore
) -> tuple[Store, str]:
    """The store of the run and what is held out of it: `NOTHING`, `DOCUMENTS`, `TAILS` or `SOURCES`.

    With data.hold_out=auto it is whole documents if they are a fair sample (`is_fair`), and tails otherwise. The store
    of whole documents says which, so that a corpus of few or large documents may be tokenized twice, the first time.
    """
    kind = data.hold_out
    if data.held_out_sources:
        kind = SOURCES
    elif not data.held_out_fraction:
        kind = NOTHING
    elif kind == "auto":
        kind = _choose(data, files) if can_be_cut(examples) else DOCUMENTS
    if kind != TAILS:
        store = make(cutting=Cutting(data.split_on))
        if kind != "auto":
            return store, kind
        fair = is_fair(store.num_bytes, data.held_out_fraction, store.hashes)
        # Chance may still put every document on one side.
        if fair and all(len(ids) for ids in store.split(data.held_out_fraction)):
            return store, DOCUMENTS
    return make(cutting=Cutting(data.split_on, data.held_out_fraction)), TAILS


def is_fair(num_bytes: np.ndarray, fraction: float, hashes: np.ndarray) -> bool:
    """Whether holding out whole documents of these sizes, int64 [documents], at random gives about `fraction` of them.

    It does if at least `LEAST_DOCUMENTS` are held out on average and none has more than a tenth of the text. Documents
    of the same text, which have the same hash, uint64 [documents], are held out together and count as one.
    """
    _, number = np.unique(np.asarray(hashes), return_inverse=True)
    # Sums in float64 are exact up to 2^53 bytes.
    sizes = np.bincount(number, weights=num_bytes)
    enough = len(sizes) * fraction >= LEAST_DOCUMENTS
    return bool(enough and sizes.max() * LARGEST_PART <= sizes.sum())


def _choose(data: DataConfig, files: Sequence[SourceFile]) -> str:
    """`TAILS` if the files alone show that there are too few documents, else "auto"."""
    # A file of plain text is one document, so nothing needs to be read to know how many there are at most.
    few = not data.split_on and len(files) * data.held_out_fraction < LEAST_DOCUMENTS
    return TAILS if few and all(_is_text(file, data.reading) for file in files) else "auto"


def _is_text(file: SourceFile, reading: Reading) -> bool:
    return detect_format(file, reading) == "text"
