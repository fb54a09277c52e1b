"""A cheap fingerprint of a corpus: of the content of its files, read in part where they are large.

Neither paths nor times go into it, so that a corpus that was moved or copied is the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Protocol

# Files of at most so many bytes are hashed whole.
WHOLE_BYTES = 4 << 20
# Of larger ones, this many blocks of this many bytes: the first, the last, and others at even distances.
BLOCKS, BLOCK_BYTES = 16, 1 << 16


class NamedContent(Protocol):
    """What the fingerprint of a corpus takes of one file."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def digest(self) -> str: ...


def file_digest(path: str) -> str:
    """A hash of the size and the content of a file. Of more than 4 MiB it reads 1 MiB, so that an edit which keeps the
    size of a large file and lies between the 16 blocks is not noticed."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def corpus_fingerprint(files: Iterable[NamedContent]) -> str:
    """A SHA-256 over the names, sizes and digests of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.size, file.digest]).encode())
    return digest.hexdigest()
