"""The fingerprint of a corpus: a hash of the names and contents of its files.

The folder of a corpus and the times of its files do not count, so a corpus that was moved or copied keeps its
fingerprint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from llmjax.files import write_atomically

# Bytes that are read at once. A choice.
_BLOCK_BYTES = 1 << 20
# The digests of files of at least this many bytes are remembered. A choice: smaller ones are read in about 10 ms.
REMEMBERED_BYTES = 1 << 24
# A digest is remembered only if the file had not changed for this long when it was read. A choice: the clocks of file
# systems tick about every 10 ms, and those of some network drives every second.
SETTLED_SECONDS = 2.0
# The most digests that are remembered. A choice: they are about 2 MB of JSON.
MAX_REMEMBERED = 10_000


class NamedContent(Protocol):
    """A file as the fingerprint of a corpus needs it."""

    @property
    def name(self) -> str:
        """Its name relative to the corpus."""

    @property
    def size(self) -> int:
        """Its bytes on disk."""

    @property
    def digest(self) -> str:
        """The `file_digest` of its content."""


def file_digest(path: str) -> str:
    """A hash of the whole content of a file, as 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class Digests:
    """Computes `file_digest`, and remembers the digests of large files in a JSON file, so that each is read only once.

    A digest is used again as long as the file has the same path, inode, size, and times of its last modification and
    its last change. Programs can set the time of the last modification, but not that of the last change. A file that
    was edited and got its old time back is therefore read again.

    Args:
      path: the JSON file. If it is missing or damaged, nothing is remembered.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
            self._known = {str(key): str(digest) for key, digest in dict(known).items()}
        self._new: dict[str, str] = {}

    def of(self, path: str) -> str:
        """The digest of the content of the file `path`."""
        stat = os.stat(path)
        if stat.st_size < REMEMBERED_BYTES:
            return file_digest(path)
        times = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        key = json.dumps([os.path.realpath(path), *times])
        if key in self._known:
            return self._known[key]
        digest = file_digest(path)
        # A file that changes twice within one tick of the clock has the same time after both changes. A second change
        # soon after this reading would go unnoticed, so the digest of a file that has just changed is not remembered.
        if time.time() - stat.st_ctime > SETTLED_SECONDS:
            self._new[key] = digest
        return digest

    def save(self) -> None:
        """Writes the JSON file if there are new digests. If it cannot be written, nothing is remembered."""
        if self._new:
            newest = [*self._known.items(), *self._new.items()][-MAX_REMEMBERED:]
            with contextlib.suppress(OSError):
                write_atomically(self._path, json.dumps(dict(newest), indent=0))


def corpus_fingerprint(files: Iterable[NamedContent]) -> str:
    """The SHA-256 of the names, sizes and digests of the files, in their order, as 64 hex digits."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.size, file.digest]).encode())
    return digest.hexdigest()
