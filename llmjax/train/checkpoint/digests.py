"""Digests of all files in a folder, written when the folder is complete and compared before it is read.

A disk does not always return what was written, and a flipped bit in an array looks like any other number.
`digests.json` holds the size of each file and a CRC-32 for each 16 MiB of it. CRC-32 finds every single flipped bit
and every run of up to 32 wrong bits; other damage escapes it once in four billion cases. It protects against
accidents, not against people. zlib computes it at about 1 GB/s a core, without holding Python's lock.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmjax.files import write_atomically

NAME = "digests.json"
# Bytes that one CRC-32 covers. A choice: large enough for few digests, small enough to share between threads.
CHUNK = 16 * 2**20
ALGORITHM = "crc32"
# A choice: a run goes on while digests are written, so writing takes few cores; everything waits for reading.
WRITING_THREADS, READING_THREADS = 2, 8


class Damaged(Exception):
    """Something on disk is damaged. The message says what is wrong, for a sentence that names the file before it."""


def write(folder: Path) -> None:
    """Writes `digests.json` for the files that are in `folder` now, and waits until it is on disk."""
    sizes = {name: (folder / name).stat().st_size for name in _files(folder)}
    pieces = [(name, offset) for name, size in sizes.items() for offset in range(0, size, CHUNK)]
    found: dict[str, list[int]] = {name: [] for name in sizes}
    with ThreadPoolExecutor(WRITING_THREADS) as pool:
        for (name, _), digest in zip(
            pieces, pool.map(lambda piece: _digest(folder, piece[0], piece[1], CHUNK), pieces)
        ):
            found[name].append(digest)
    files = {name: {"size": size, "digests": found[name]} for name, size in sizes.items()}
    write_atomically(folder / NAME, json.dumps({"algorithm": ALGORITHM, "chunk": CHUNK, "files": files}))


def check(folder: Path, *, contents: bool = True, part: int = 0, parts: int = 1) -> None:
    """Raises Damaged, which says why, where the files in `folder` do not match its digests.

    contents     whether to compare contents. Otherwise only sizes are compared, and no file is read
    part, parts  the share of this process, where several share the work

    Files without a digest are ignored.
    """
    chunk, files = _read(folder)
    pieces = []
    for name, (size, digests) in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise Damaged(f"{folder.name}/{name}: {error.strerror}") from None
        if found != size:
            raise Damaged(f"{folder.name}/{name} has {found:,} bytes instead of {size:,}")
        pieces += [(name, number * chunk, chunk, digest) for number, digest in enumerate(digests)]
    if not contents:
        return
    with ThreadPoolExecutor(READING_THREADS) as pool:
        mine = pieces[part::parts]
        for (name, offset, _, expected), digest in zip(
            mine, pool.map(lambda p: _digest(folder, *p[:3]), mine)
        ):
            if digest != expected:
                raise Damaged(
                    f"{folder.name}/{name} has other contents than were written near byte {offset:,}"
                )


def of_json(value: object) -> int:
    """The digest of a JSON value. It does not depend on the order of keys or on white space in a file."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _read(folder: Path) -> tuple[int, dict[str, tuple[int, list[int]]]]:
    """Bytes of a chunk, and for each file its size and the digests of its chunks."""
    try:
        saved = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files = {name: (entry["size"], entry["digests"]) for name, entry in saved["files"].items()}
        chunk, known = saved["chunk"], saved["algorithm"] == ALGORITHM
        fits = all(len(digests) == -(-size // chunk) for size, digests in files.values())
    except OSError as error:
        raise Damaged(f"{folder.name}/{NAME}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        known = fits = False
    if not (known and fits and files):
        raise Damaged(f"{folder.name}/{NAME} holds no digests")
    return chunk, files


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)


def _digest(folder: Path, name: str, offset: int, chunk: int) -> int:
    try:
        with (folder / name).open("rb") as file:
            file.seek(offset)
            return zlib.crc32(file.read(chunk))
    except OSError as error:
        raise Damaged(f"{folder.name}/{name}: {error.strerror}") from None
