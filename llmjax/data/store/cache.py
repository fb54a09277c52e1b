"""A cache of tokenizers and token stores. Each lies in a folder named by a hash of everything it depends on.

The key of a corpus is the fingerprint of its files' names and contents, wherever the files lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llmjax.data.checksums import DamagedError
from llmjax.data.examples.contract import Examples, OwnTexts, Structured, naming
from llmjax.data.sources.cutting import WHOLE, Cutting
from llmjax.data.sources.fingerprint import corpus_fingerprint, file_digest
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Reading
from llmjax.data.sources.records import FOLDER, places_of, read_records, read_texts
from llmjax.data.store.build import DOCUMENTS, READING, build_store
from llmjax.data.store.columns import FORMAT_VERSION
from llmjax.data.store.store import Store, open_store
from llmjax.data.tokenizer.kinds import KINDS, TokenizerConfig
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.data.tokenizer.training import TRAINER_VERSION, train_tokenizer
from llmjax.errors import UserError
from llmjax.escapes import complain
from llmjax.files import new_folder


def cached_tokenizer(
    cache_dir: str | os.PathLike,
    config: TokenizerConfig,
    files: Sequence[SourceFile],
    *,
    reading: Reading = READING,
    own: OwnTexts | None = None,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] = complain,
) -> Tokenizer:
    """Returns the tokenizer that `config` describes, from the cache if it was trained before.

    If `config.path` is set, the tokenizer is loaded from there. If its kind needs no training, it is made at once.

    Args:
      cache_dir: the folder of the cache.
      config: the `tokenizer` section of the config.
      files: the files of the corpus, on whose text the tokenizer is trained.
      reading: how the files are read, and the field of a record that holds its text.
      own: the task that says which texts of a record are encoded; None if it is the text field.
      progress: called as progress(done, total) while the files are read, in bytes of the files.
      report: called with one sentence if a cached tokenizer is damaged and is trained again.
    """
    if config.path:
        return load_tokenizer(config.path)
    # Some kinds, such as bytes, need no training and are not cached.
    fixed = KINDS[config.kind].fixed
    if fixed is not None:
        return fixed(config.num_reserved)
    settings = _tokenizer_settings(config, reading, own)
    directory = Path(cache_dir) / f"tokenizer-{_key(corpus_fingerprint(files), settings)}"
    # lexists, because a broken link in place of the folder counts as damage and must be replaced.
    if os.path.lexists(directory):
        try:
            return _load_whole(directory)
        except DamagedError as error:
            report(f"{error.reason}; it is trained again on data.sources")

    def texts():
        done, total = 0, sum(file.size for file in files)
        for file in files:
            if own is None:
                yield from read_texts(file, reading)
            else:
                for record in read_records(file, dataclasses.replace(reading, fields=own.fields)):
                    with naming(record.name):
                        texts = own.texts(record.fields)
                    yield from texts
            done += file.size
            if progress is not None:
                progress(done, total)

    tokenizer = train_tokenizer(config, texts())
    with new_folder(directory, _holds_tokenizer) as unfinished:
        tokenizer.save(unfinished)
    return tokenizer


def _tokenizer_settings(config: TokenizerConfig, reading: Reading, own: OwnTexts | None) -> list[object]:
    """Everything besides the text that a trained tokenizer depends on."""
    settings: list[object] = [
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
    if reading.columns:
        settings += ["columns", reading.columns]
    if own is not None:
        settings += ["texts", repr(own)]
    return settings


def _load_whole(directory: Path) -> Tokenizer:
    """Loads the tokenizer in a cache folder. Raises `DamagedError` if it has no tokenizer.json to check it by."""
    if not (directory / "tokenizer.json").is_file():
        raise DamagedError(f"tokenizer {str(directory)!r} is damaged (tokenizer.json is missing)")
    return load_tokenizer(directory)


def _holds_tokenizer(directory: Path) -> bool:
    """Whether `directory` holds an undamaged tokenizer."""
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
    cutting: Cutting = WHOLE,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] = complain,
) -> Store:
    """Returns the store of these files, from the cache if `build_store` built it before with the same arguments.

    A damaged store is built again: at once if opening it finds the damage, else when a run reads the damaged block.

    Args:
      cache_dir: the folder of the cache.
      files: the files of the corpus.
      tokenizer: encodes the text.
      examples: the host half of the task, which makes an example of each record.
      reading: how the files are read.
      cutting: how documents are cut into several.
      num_workers: the number of processes that encode.
      progress: called as progress(done, total) while the store is built, in bytes of the files.
      report: called with one sentence if a store is damaged and is built again.
    """
    settings = _store_settings(files, tokenizer, examples, reading, cutting)
    directory = Path(cache_dir) / f"store-{_key(corpus_fingerprint(files), settings)}"

    def build(progress: Callable[[int, int], None] | None) -> Store:
        return build_store(
            directory,
            files,
            tokenizer,
            examples=examples,
            reading=reading,
            cutting=cutting,
            num_workers=num_workers,
            progress=progress,
        )

    def build_again(error: DamagedError) -> None:
        # Other files would give other documents, and the run could not continue with them.
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
    # Large files are checked only when they are read, so damage may show up in the middle of a run.
    store.remake = build_again
    return store


def _store_settings(
    files: Sequence[SourceFile], tokenizer: Tokenizer, examples: Examples, reading: Reading, cutting: Cutting
) -> list[object]:
    """Everything besides the text that a store depends on."""
    origins = [file.origin for file in files]
    how = [reading.on_bad_text, reading.encoding]
    settings: list[object] = [
        tokenizer.fingerprint,
        repr(examples),
        examples.version,
        *how,
        origins,
        FORMAT_VERSION,
    ]
    # Added only where documents are cut or marked, so that the stores of whole documents keep their keys.
    if cutting != WHOLE:
        settings += ["cutting", cutting.split_on, cutting.tail]
    if any(file.held_out for file in files):
        settings += ["held out", [file.held_out for file in files]]
    if reading.columns:
        settings += ["columns", reading.columns]
    # What a conversation becomes may be up to the tokenizer's template, which its fingerprint does not cover.
    if tokenizer.chat_template and isinstance(examples, Structured):
        settings += ["chat template", tokenizer.chat_template]
    # The names of files are part of the fingerprint, and those of their folders are not always.
    if FOLDER in examples.fields:
        settings += ["folders", [places_of(file)[FOLDER] for file in files]]
    return settings


def _has_changed(file: SourceFile) -> bool:
    """Whether the file is missing or holds something else than when it was listed."""
    try:
        return file_digest(file.path) != file.digest
    except OSError:
        return True


def _key(corpus: str, settings: Sequence[object]) -> str:
    """The name of a cache entry: 16 hex digits of SHA-256 over the fingerprint of the corpus and the settings."""
    return hashlib.sha256(json.dumps([corpus, *settings]).encode()).hexdigest()[:16]
