"""Checksums of what lies in a cache, so that a damaged byte is found before it is used.

Small files are checked whole, each time they are opened, against `checksums.json` in their folder. Large ones are
checked by blocks, each when it is first read, so that no start waits for the whole of a corpus to be read. CRC-32 finds
every damage of up to 32 bits in a row and all but one in four billion others; it does not stop a forger.
"""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llmjax.errors import UserError
from llmjax.files import write_atomically

# What one first read of a document costs at most beside the document itself.
BLOCK_BYTES = 1 << 16
_FILE = "checksums.json"
# What the system says where a file is gone, is a folder or a circle of links, or lies on a failing disk.
_ON_DISK = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE}


class DamagedError(UserError):
    """Something in a cache is not what was written there.

    `reason` says which and how, without a remedy; whoever can make the thing again says that it does.
    """

    def __init__(self, reason: str, remedy: str = "delete it, and it is made again"):
        super().__init__(f"{reason}: {remedy}.")
        self.reason = reason
        self._remedy = remedy

    def __reduce__(self):
        return DamagedError, (self.reason, self._remedy)


def raise_other(error: Exception) -> None:
    """Raises an error that says nothing about what lies on the disk: of permissions, of memory, of open files."""
    if isinstance(error, OSError) and error.errno not in _ON_DISK:
        raise error


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Writes the checksums of the files `names` in `folder` beside them."""
    sums = {name: _checksum(folder / name) for name in names}
    write_atomically(folder / _FILE, json.dumps(sums, indent=1) + "\n")


def verify(folder: Path, names: Iterable[str], what: str) -> None:
    """Raises `DamagedError` unless the files `names` in `folder` are what was written; `what` says what they are."""
    try:
        sums = json.loads((folder / _FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise_other(error)
        raise DamagedError(f"{what} {str(folder)!r} has no readable {_FILE}") from None
    for name in names:
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise_other(error)
            raise DamagedError(f"{what} {str(folder)!r} is damaged ({name} cannot be read)") from None
        if not isinstance(sums, dict) or sums.get(name) != found:
            raise DamagedError(f"{what} {str(folder)!r} is damaged ({name} is not what was written)")


def _checksum(path: Path) -> int:
    """CRC-32 of a file; of nothing, which cannot be mapped, 0."""
    if not path.stat().st_size:
        return 0
    return zlib.crc32(np.memmap(path, np.uint8, "r").data)


def block_checksums(path: Path) -> np.ndarray:
    """uint32 [blocks], the CRC-32 of each `BLOCK_BYTES` of a file."""
    with open(path, "rb") as file:
        return np.array([zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")], "<u4")


class CheckedArray:
    """A read-only array over a file, each block of which is checked when it is first read.

    Args:
      path: of the file.
      dtype: of its elements, of 1, 2, 4 or 8 bytes.
      count: of its elements.
      checksums: uint32 [blocks], as `block_checksums` gives them.
      what: what the file belongs to, for the sentence that says it is damaged.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int, checksums: np.ndarray, what: str):
        self._array = map_file(path, dtype, count)
        self._checksums = checksums
        self._what, self._name = what, path.name
        self._shift = (BLOCK_BYTES // self._array.itemsize).bit_length() - 1
        self._unchecked = bytearray(b"\1") * len(checksums)

    def view(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`, without a copy; `DamagedError` where one of their blocks is damaged."""
        first, last = start >> self._shift, (stop - 1 >> self._shift) + 1
        if self._unchecked.find(1, first, last) >= 0:
            self._check(first, last)
        return self._array[start:stop]

    def check_all(self) -> None:
        """Checks every block."""
        self._check(0, len(self._checksums))

    def _check(self, first: int, last: int) -> None:
        size = 1 << self._shift
        for block in range(first, last):
            if self._unchecked[block]:
                found = zlib.crc32(self._array[block * size : (block + 1) * size].view("u1").data)
                if found != self._checksums[block]:
                    at = f"{block * BLOCK_BYTES} to {(block + 1) * BLOCK_BYTES}"
                    raise DamagedError(
                        f"{self._what} is damaged ({self._name} between bytes {at} is not what was written)"
                    )
                self._unchecked[block] = 0


def map_file(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """A read-only array over the file; a plain ndarray, because slicing np.memmap costs microseconds."""
    if not count:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,))).view(np.ndarray)
