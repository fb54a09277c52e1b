"""Which documents a run was trained on: recorded beside it, and compared with those that a later command reads.

The fingerprint decides whether they are the same: it covers every token of every document in order, and no path, so a
corpus that merely moved is the same. The record is there to say what differs.
"""

from __future__ import annotations

import json
import pathlib

from llmjax.build.corpus import Corpus
from llmjax.data.checksums import DamagedError
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import new_folder
from llmjax.names import plain_name
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.workdir.contents import write_json

RECORD = "documents.json"
# Documents whose names and hashes are recorded; of a larger corpus the first.
LISTED = 10_000
# Differing documents that are named.
NAMED = 3


def write_record(workdir: pathlib.Path, corpus: Corpus) -> None:
    """Writes `workdir`/documents.json: counts, fingerprint, and hash and name of the first documents."""
    write_json(workdir / RECORD, _record(corpus))


def trained_on(workdir: pathlib.Path, update: int | None = None) -> str:
    """The fingerprint of the documents behind a checkpoint in `workdir`: that of `update`, or the latest."""
    # Whoever reads the arrays says which checkpoints are damaged.
    with Checkpoints(workdir / "checkpoints", read_only=True, tell=lambda text: None) as checkpoints:
        return checkpoints.read_meta(update)["data_fingerprint"]


def describe_difference(workdir: pathlib.Path, fingerprint: str, corpus: Corpus) -> str:
    """How the documents of `corpus` differ from those of the run in `workdir`, in one sentence; "" if they do not.

    `fingerprint`: of the run's documents, as its checkpoints hold it.
    """
    content = corpus.store.header.content_fingerprint
    if fingerprint.endswith(content):
        return ""
    text = f"the documents behind data.sources are not those of the run in {plain_name(workdir)}"
    here, there = _record(corpus), _read_record(workdir, fingerprint)
    if there is None:
        return f"{text} ({_count(here)} here, not recorded there)"
    text += f" ({_count(here)} here, {_count(there)} there"
    ours, theirs = here["listed"], there["listed"]
    names = [name for name in theirs | ours if ours.get(name) != theirs.get(name)]
    if not names:
        return f"{text}, with other tokens)"
    kinds = ("new", "gone", "changed")
    named = [f"{plain_name(name)} {kinds[(name in theirs) * (1 + (name in ours))]}" for name in names[:NAMED]]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{text}: {', '.join(named)}{more})"


def mend_tokenizer(workdir: pathlib.Path, corpus: Corpus, different: str) -> None:
    """Saves the tokenizer of the run in `workdir` again if it is damaged; UserError where that would be another one."""
    try:
        load_tokenizer(workdir / "tokenizer")
    except DamagedError as error:
        if different:
            raise UserError(
                f"{error.reason} and cannot be made again, for {different}; restore the tokenizer or the documents"
            ) from None
        save_tokenizer(workdir, corpus.tokenizer)


def save_tokenizer(workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Saves the tokenizer of the run in `workdir` unless it is there."""

    def is_saved(folder: pathlib.Path) -> bool:
        try:
            return load_tokenizer(folder).fingerprint == tokenizer.fingerprint
        except DamagedError:
            return False

    folder = workdir / "tokenizer"
    if not is_saved(folder):
        with new_folder(folder, is_saved) as unfinished:
            tokenizer.save(unfinished)


def _record(corpus: Corpus) -> dict:
    store = corpus.store
    listed = {store.name(i): f"{int(store.hashes[i]):016x}" for i in range(min(len(store), LISTED))}
    return {
        "content": store.header.content_fingerprint,
        "documents": len(store),
        "bytes": store.header.num_bytes,
        "tokens": store.header.num_tokens,
        "listed": listed,
    }


def _read_record(workdir: pathlib.Path, fingerprint: str) -> dict | None:
    """The record of these documents; None where there is none that can be read."""
    try:
        record = json.loads((workdir / RECORD).read_text(encoding="utf-8"))
        if fingerprint.endswith(record["content"]) and isinstance(record["listed"], dict):
            _count(record)
            return record
    except (FileNotFoundError, IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _count(record: dict) -> str:
    return f"{record['documents']:,} documents of {record['bytes']:,} bytes"
