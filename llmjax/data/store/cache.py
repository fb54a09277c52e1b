"""Tokenizers and stores made once and found again, by a hash of everything that they depend on.

The key of a corpus is the fingerprint of its files' names and contents, wherever the files lie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llmjax.data.checksums import DamagedError
from llmjax.data.examples.contract import Examples
from llmjax.data.sources.fingerprint import corpus_fingerprint, file_digest
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Reading
from llmjax.data.sources.records import read_texts
from llmjax.data.store.build import DOCUMENTS, READING, build_store
from llmjax.data.store.columns import FORMAT_VERSION
from llmjax.data.store.store import Store, open_store
from llmjax.data.tokenizer.tokenizer import (
    KINDS,
    TRAINER_VERSION,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from llmjax.errors import UserError
from llmjax.escapes import complain
from llmjax.files import new_folder


def cached_tokenizer(
    cache_dir: str | os.PathLike,
    config: TokenizerConfig,
    files: Sequence[SourceFile],
    *,
    reading: Reading = READING,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] = complain,
) -> Tokenizer:
    """The tokenizer of `config.path` where that is set, else one trained on the files, now or before.

    `progress(done, total)` is called with bytes of the files while they are read for training. A damaged one is
    trained again, which `report` is told.
    """
    if config.path:
        return load_tokenizer(config.path)
    fixed = KINDS[config.kind].fixed
    if fixed is not None:
        return fixed(config.num_reserved)
    settings = [
        config.kind,
        config.vocab_size,
        config.train_bytes,
        config.character_coverage,
        config.num_reserved,
        reading.fields[0],
        reading.on_bad_text,
        reading.encoding,
        TRAINER_VERSION,
    ]
    directory = Path(cache_dir) / f"tokenizer-{_key(corpus_fingerprint(files), settings)}"
    if os.path.lexists(directory):
        try:
            return _load_whole(directory)
        except DamagedError as error:
            report(f"{error.reason}; it is trained again on data.sources")

    def texts():
        done, total = 0, sum(file.size for file in files)
        for file in files:
            yield from read_texts(file, reading)
            done += file.size
            if progress is not None:
                progress(done, total)

    tokenizer = train_tokenizer(config, texts())
    with new_folder(directory, _holds_tokenizer) as unfinished:
        tokenizer.save(unfinished)
    return tokenizer


def _load_whole(directory: Path) -> Tokenizer:
    """The tokenizer saved in a folder, with its fingerprint to check it by."""
    if not (directory / "tokenizer.json").is_file():
        raise DamagedError(f"tokenizer {str(directory)!r} is damaged (tokenizer.json is missing)")
    return load_tokenizer(directory)


def _holds_tokenizer(directory: Path) -> bool:
    try:
        _load_whole(directory)
    except DamagedError:
        return False
    return True


def cached_store(
    cache_dir: str | os.PathLike,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    *,
    examples: Examples = DOCUMENTS,
    reading: Reading = READING,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] = complain,
) -> Store:
    """The store of these files, this tokenizer and the examples of a task, built by `build_store` where none is whole.

    One that is damaged is built again, which `report` is told: at once, or when the damage is read in mid-run.
    """
    origins = [file.origin for file in files]
    how = [reading.on_bad_text, reading.encoding]
    settings = [tokenizer.fingerprint, repr(examples), examples.version, *how, origins, FORMAT_VERSION]
    directory = Path(cache_dir) / f"store-{_key(corpus_fingerprint(files), settings)}"

    def build(progress: Callable[[int, int], None] | None) -> Store:
        return build_store(
            directory,
            files,
            tokenizer,
            examples=examples,
            reading=reading,
            num_workers=num_workers,
            progress=progress,
        )

    def build_again(error: DamagedError) -> None:
        if any(_has_changed(file) for file in files):
            raise UserError(f"{error.reason}, and data.sources changed since the run began: start it again.")
        report(f"{error.reason}; it is built again from data.sources")
        build(None)

    store = None
    if os.path.lexists(directory):
        try:
            store = open_store(directory, tokenizer)
        except DamagedError as error:
            report(f"{error.reason}; it is built again from data.sources")
    store = build(progress) if store is None else store
    store.remake = build_again
    return store


def _has_changed(file: SourceFile) -> bool:
    try:
        return file_digest(file.path) != file.digest
    except OSError:
        return True


def _key(corpus: str, settings: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([corpus, *settings]).encode()).hexdigest()[:16]
