"""Checksums of cached files, which find a damaged byte before it is used.

Small files are checked whole, each time they are opened, against `checksums.json` in their folder. Large files are
checked in blocks, each when it is first read, so that a run can start before the whole corpus was read. The checksum is
CRC-32. It finds all damage within 32 consecutive bits and misses other damage once in four billion (2**32) cases. It
does not protect against forgery.
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

# The size of a block. Reading a document checks every block that it touches, so a smaller size reads less besides the
# document, and needs more checksums.
BLOCK_BYTES = 1 << 16
_FILE = "checksums.json"
# The system errors that mean damage: the file is missing, is a folder, is in a circle of links, or its disk fails.
_DAMAGE_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE}


class DamagedError(UserError):
    """A cached file differs from what was written.

    `reason` says which file is damaged and how. The message adds `remedy`, what the user can do. A caller that repairs
    the damage itself reports `reason` alone.
    """

    def __init__(self, reason: str, remedy: str = "delete it, and it is made again"):
        super().__init__(f"{reason}: {remedy}.")
        self.reason = reason
        self._remedy = remedy

    def __reduce__(self):
        """Pickles the error by its arguments: the default passes the whole message as `reason`."""
        return DamagedError, (self.reason, self._remedy)


def raise_unless_damage(error: Exception) -> None:
    """Raises `error` if it is a system error that does not mean damage, such as missing permissions or memory."""
    if isinstance(error, OSError) and error.errno not in _DAMAGE_ERRORS:
        raise error


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Writes the checksums of the files `names` in `folder` into checksums.json in the same folder."""
    sums = {name: _checksum(folder / name) for name in names}
    write_atomically(folder / _FILE, json.dumps(sums, indent=1) + "\n")


def verify(folder: Path, names: Iterable[str], what: str) -> None:
    """Raises `DamagedError` unless the files `names` in `folder` match checksums.json.

    The message calls the folder `what`, for example "packing plan".
    """
    try:
        sums = json.loads((folder / _FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise_unless_damage(error)
        raise DamagedError(f"{what} {str(folder)!r} has no readable {_FILE}") from None
    for name in names:
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise_unless_damage(error)
            raise DamagedError(f"{what} {str(folder)!r} is damaged ({name} cannot be read)") from None
        # A damaged checksums.json may still be valid JSON of another type.
        if not isinstance(sums, dict) or sums.get(name) != found:
            raise DamagedError(f"{what} {str(folder)!r} is damaged ({name} is not what was written)")


def _checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    # An empty file cannot be memory-mapped. Its CRC-32 is 0.
    if not path.stat().st_size:
        return 0
    return zlib.crc32(np.memmap(path, np.uint8, "r").data)


def block_checksums(path: Path) -> np.ndarray:
    """The CRC-32 of each block of `BLOCK_BYTES` bytes of a file: uint32 [blocks]. The last block may be shorter."""
    with open(path, "rb") as file:
        return np.array([zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")], "<u4")


class CheckedArray:
    """A read-only memory-mapped array [count] that checks each block of its file when it is first read.

    Args:
      path: the file.
      dtype: the type of the elements; the size of an element is a power of two.
      count: the number of elements.
      checksums: uint32 [blocks], the result of `block_checksums` when the file was written.
      what: the name of the store or folder that the file belongs to, for error messages.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int, checksums: np.ndarray, what: str):
        self._array = map_file(path, dtype, count)
        self._checksums = checksums
        self._what, self._name = what, path.name
        # An element i lies in block i >> shift, because a block holds 2**shift elements.
        self._shift = (BLOCK_BYTES // self._array.itemsize).bit_length() - 1
        # One byte for each block, 1 until it is checked: `bytearray.find` searches quickly.
        self._unchecked = bytearray(b"\1") * len(checksums)

    def view(self, start: int, stop: int) -> np.ndarray:
        """Elements start to stop - 1, without a copy. Raises `DamagedError` if one of their blocks is damaged."""
        first, last = start >> self._shift, (stop - 1 >> self._shift) + 1
        if self._unchecked.find(1, first, last) >= 0:
            self._check(first, last)
        return self._array[start:stop]

    def check_all(self) -> None:
        """Raises `DamagedError` if any block is damaged."""
        self._check(0, len(self._checksums))

    def _check(self, first: int, last: int) -> None:
        """Checks the blocks from `first` to last - 1 that were not checked before."""
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
    """Memory-maps a file as a read-only array [count]."""
    # An empty file cannot be memory-mapped.
    if not count:
        return np.zeros(0, dtype)
    # A plain ndarray over the map, because slicing np.memmap itself costs microseconds.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,))).view(np.ndarray)
