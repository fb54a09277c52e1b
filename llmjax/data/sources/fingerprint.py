"""The fingerprint of a corpus: a hash of the names and contents of its files.

Neither paths nor times go into it, so that a corpus that was moved or copied is the same corpus.
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

_BLOCK_BYTES = 1 << 20
# Files of at least so many bytes, which take more than some ten milliseconds to read, have their digests remembered.
REMEMBERED_BYTES = 1 << 24
# A choice: how long before it is read a file must have been left alone. The clocks of file systems tick every 10 ms,
# those of some network drives every second.
SETTLED_SECONDS = 2.0
# A choice: how many digests are kept, about 2 MB of JSON.
MAX_REMEMBERED = 10_000


class NamedContent(Protocol):
    """What the fingerprint of a corpus takes of one file."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> str: ...


def file_digest(path: str) -> str:
    """A hash of the whole content of a file, in hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class Digests:
    """`file_digest`, with the digests of large files kept in a JSON file, so that they are read once only.

    A digest is used again while the file has the same path, inode, size, and times of its last modification and last
    change. No program can set the time of the last change: a file that was edited under its old time is read again.

    Args:
      path: the JSON file. Where it is missing or damaged, the files are read.
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
        # A file that changes twice within one tick of the clock has the same time after both.
        if time.time() - stat.st_ctime > SETTLED_SECONDS:
            self._new[key] = digest
        return digest

    def save(self) -> None:
        """Writes the digests that were found since the beginning. Without room or permission they are read again."""
        if self._new:
            newest = [*self._known.items(), *self._new.items()][-MAX_REMEMBERED:]
            with contextlib.suppress(OSError):
                write_atomically(self._path, json.dumps(dict(newest), indent=0))


def corpus_fingerprint(files: Iterable[NamedContent]) -> str:
    """A SHA-256 over the names, sizes and digests of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.size, file.digest]).encode())
    return digest.hexdigest()
