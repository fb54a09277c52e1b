"""The host's half of a run: text, tokenizer, token store and packed sequences, made or found in a cache."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from llmjax.build.hold_out import TAILS, make_store, search_files
from llmjax.config.resolve import Derived
from llmjax.config.schema import Config
from llmjax.data.examples.contract import Examples, OwnTexts, Structured, can_be_cut
from llmjax.data.packing.make_plan import cached_plan
from llmjax.data.packing.plan import PackingPlan, check_corpus
from llmjax.data.packing.two_streams import SourceStream
from llmjax.data.pipeline import PackedSequences
from llmjax.data.sources.fingerprint import Digests
from llmjax.data.sources.listing import Listing, SourceFile
from llmjax.data.sources.reading import Reading
from llmjax.data.store.cache import cached_store, cached_tokenizer
from llmjax.data.store.store import Store
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.data.tokenizer.vocabulary import Vocabulary, vocabulary_of
from llmjax.names import at_home, plain_name

# What is being made, how much of it is done, and how much there is; both 0 where that is not known.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text, from documents to packed sequences.

    tokenizer         turns text into tokens
    store             the documents, tokenized
    train_plan        which documents that are trained on share a sequence
    held_out_plan     the same for the documents that are held out
    train             the sequences that are trained on
    held_out          the sequences that are held out; None where nothing is held out
    held_out_ids      int64 [n], the numbers of the held-out documents in the store
    listing           the files of data.sources
    hold_out          what is held out, a name of `build/hold_out.py`
    held_out_files    the files of data.held_out_sources
    """

    tokenizer: Tokenizer
    store: Store
    train_plan: PackingPlan
    held_out_plan: PackingPlan
    train: PackedSequences
    held_out: PackedSequences | None
    held_out_ids: np.ndarray
    listing: Listing
    hold_out: str
    held_out_files: tuple[SourceFile, ...]

    def vocabulary(self) -> Vocabulary:
        """What a task may know of the ids of the tokenizer."""
        return vocabulary_of(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """What the sequence numbers mean: a data cursor is of use only with the same fingerprint."""
        return self.train_plan.fingerprint + self.store.header.content_fingerprint

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out text."""
        return int(self.store.num_bytes[self.held_out_ids].sum())

    @property
    def held_out_duplicates(self) -> int:
        """The number of held-out documents that are also trained on, word for word."""
        is_held_out = np.zeros(len(self.store), bool)
        is_held_out[self.held_out_ids] = True
        hashes = np.asarray(self.store.hashes)
        return int(np.isin(hashes[is_held_out], hashes[~is_held_out]).sum())

    def train_text(self, first: int, count: int) -> str:
        """What `count` packed sequences from number `first` on hold, document by document, as Markdown."""
        parts = []
        for doc, start, stop in self.train.spans(np.arange(first, first + count)):
            name = plain_name(self.store.name(doc))
            tokens = self.store.tokens(doc, start, stop).tolist()
            text = self.tokenizer.decode(tokens, continues=start > 0)
            parts.append(f"## {name} [tokens {start}:{stop}]\n\n{text}\n")
        return "\n".join(parts)

    def held_out_text(self, limit: int = 64 * 2**20) -> bytes:
        """The held-out documents as bytes, whole documents until `limit` is passed."""
        parts, size = [], 0
        for doc in self.held_out_ids:
            if size >= limit:
                break
            tokens = self.store.tokens(doc, 1, int(self.store.lengths[doc]) - 1)
            parts.append(self.tokenizer.decode(tokens.tolist()).encode())
            size += len(parts[-1])
        return b"".join(parts)


def cache_directory(config: Config) -> pathlib.Path:
    """Where tokenizers and stores are kept between runs."""
    if config.data.cache_dir:
        return at_home(config.data.cache_dir, "data.cache_dir")
    return at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "data.cache_dir") / "llmjax"


def _make_tokenizer(
    config: Config, examples: Examples, files: Sequence[SourceFile], reading: Reading, progress: Progress
) -> Tokenizer:
    """The tokenizer that the config names, or one that is trained on the texts of `files` that a task encodes."""

    def said(done: int, total: int) -> None:
        # The tokenizer is trained on the first bytes only, and its trainer does not say how much it has done.
        needed = min(total, config.tokenizer.train_bytes)
        if done < needed:
            progress("reading the text", done, needed)
        else:
            progress("training the tokenizer", 0, 0)

    progress("preparing the tokenizer", 0, 0)
    return cached_tokenizer(
        cache_directory(config),
        config.tokenizer,
        files,
        reading=reading,
        own=examples if isinstance(examples, OwnTexts) else None,
        progress=said,
    )


def make_corpus(
    config: Config, derived: Derived, progress: Progress = lambda what, done, total: None
) -> Corpus:
    """Reads the sources, or what was made of them before; UserError where they do not fill a batch."""
    data, cache, examples = config.data, cache_directory(config), derived.examples
    reading = dataclasses.replace(
        data.reading,
        structured=examples.structured if isinstance(examples, Structured) else (),
        texts=examples.further_texts if isinstance(examples, OwnTexts) else (),
    )

    progress("looking through data.sources", 0, 0)
    digests = Digests(cache / "digests.json")
    listing, held_out_files = search_files(
        data, digest_of=digests.of, progress=functools.partial(progress, "looking for changes")
    )
    digests.save()
    files = (*listing.files, *held_out_files)
    # The held-out files have no say in what a token is.
    tokenizer = _make_tokenizer(config, examples, listing.files, reading, progress)
    make = functools.partial(
        cached_store,
        cache,
        files,
        tokenizer,
        examples=examples,
        reading=reading,
        num_workers=data.num_workers or os.cpu_count() or 1,
        progress=functools.partial(progress, "tokenizing"),
    )
    store, hold_out = make_store(data, examples, files, make)
    progress("packing", 0, 0)
    train_ids, held_out_ids = store.split(data.held_out_fraction)
    source = None if store.source_lengths is None else SourceStream(store.source_lengths, derived.source_len)
    borders = store.turns if "turns" in examples.columns else None
    train_plan, held_out_plan = (
        cached_plan(
            store.lengths, ids, data.seq_len, config.seed, cache / "plans", source=source, borders=borders
        )
        for ids in (train_ids, held_out_ids)
    )
    check_corpus(
        train_plan,
        held_out_plan,
        sequences_per_update=derived.batch.sequences_per_update,
        held_out_fraction=data.held_out_fraction,
        held_out_sources=data.held_out_sources,
        tails=hold_out == TAILS,
        can_cut=can_be_cut(examples),
    )
    sequences = functools.partial(PackedSequences, store, seed=config.seed, columns=examples.columns)
    held_out = sequences(held_out_plan, repeat=False) if held_out_plan.num_rows else None
    return Corpus(
        tokenizer,
        store,
        train_plan,
        held_out_plan,
        sequences(train_plan),
        held_out,
        held_out_ids,
        listing,
        hold_out,
        held_out_files,
    )
