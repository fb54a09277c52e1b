"""Reads the corpus of a run in every process, and makes sure that all processes have read the same."""

from __future__ import annotations

import pathlib

from llmjax.build.corpus import Corpus, make_corpus
from llmjax.config.init_from import with_tokenizer
from llmjax.config.resolve import Derived
from llmjax.config.schema import Config
from llmjax.parallel.agreement import check_same, together
from llmjax.terminal.stages import StageProgress


def read_corpus(config: Config, derived: Derived, workdir: pathlib.Path) -> Corpus:
    """The corpus of a run, tokenized and packed, with the tokenizer of the workdir if there is one.

    Raises `UserError` in every process if one of them cannot read the corpus, or reads another than the others.
    """
    with StageProgress() as progress:
        corpus = together(lambda: make_corpus(with_tokenizer(config, workdir), derived, progress))
    seen = {"the tokenizer": corpus.tokenizer.fingerprint, "the documents": corpus.fingerprint}
    check_same(
        {name: f"one of digest {value[:12]}" for name, value in seen.items()},
        "give every process the same files behind data.sources and tokenizer.path",
    )
    return corpus
