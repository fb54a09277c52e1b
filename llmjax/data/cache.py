"""Tokenizers and stores made once and found again, by a hash of everything that they depend on.

The key of a corpus is its files' names, sizes and times of change, so looking it up reads no text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llmjax.data.sources import SourceFile, corpus_fingerprint, read_documents
from llmjax.data.store import FORMAT_VERSION, Store, build_store, open_store
from llmjax.data.tokenizer import (
    TRAINER_VERSION,
    ByteTokenizer,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from llmjax.errors import UserError


def cached_tokenizer(
    cache_dir: str | os.PathLike,
    config: TokenizerConfig,
    files: Sequence[SourceFile],
    *,
    text_field: str = "text",
    on_bad_text: str = "error",
    progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """The tokenizer of `config.path` where that is set, else one trained on the files, now or before.

    `progress(done, total)` is called with bytes of the files while they are read for training.
    """
    if config.path:
        return load_tokenizer(config.path)
    if config.kind == "byte":
        return ByteTokenizer(config.num_reserved)
    settings = [
        config.kind,
        config.vocab_size,
        config.train_bytes,
        config.character_coverage,
        config.num_reserved,
        text_field,
        on_bad_text,
        TRAINER_VERSION,
    ]
    directory = Path(cache_dir) / f"tokenizer-{_key(corpus_fingerprint(files), settings)}"
    if (directory / "tokenizer.json").is_file():
        return load_tokenizer(directory)

    def texts():
        done, total = 0, sum(file.size for file in files)
        for file in files:
            for document in read_documents(file, text_field=text_field, on_bad_text=on_bad_text):
                yield document.text
            done += file.size
            if progress is not None:
                progress(done, total)

    tokenizer = train_tokenizer(config, texts())
    tokenizer.save(directory)
    return tokenizer


def cached_store(
    cache_dir: str | os.PathLike,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    on_bad_text: str = "error",
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """The store of these files and this tokenizer, built unless it is there and whole. See `build_store`."""
    settings = [tokenizer.fingerprint, text_field, on_bad_text, FORMAT_VERSION]
    directory = Path(cache_dir) / f"store-{_key(corpus_fingerprint(files), settings)}"
    try:
        return open_store(directory, tokenizer)
    except UserError:
        return build_store(
            directory,
            files,
            tokenizer,
            text_field=text_field,
            on_bad_text=on_bad_text,
            num_workers=num_workers,
            progress=progress,
        )


def _key(corpus: str, settings: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([corpus, *settings]).encode()).hexdigest()[:16]
