"""Reads files that are compressed with gzip, Zstandard, bzip2 or xz.

A compressed file may consist of several members, each compressed by itself, one after the other. A file that ends too
early is an error, and so are bytes after the last member that do not belong to it. The first bytes of a file say how it
is compressed. If its name has the suffix of a compression and its first bytes do not, the file is damaged.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Reading, ReadStats
from llmjax.errors import UserError

# Unpacked bytes that are held in a buffer. A choice.
_BUFFER = 1 << 20
# Compressed bytes that are read at once. A choice.
_BLOCK = 1 << 16
# Bytes to which every compressed file may unpack, however small it is. A choice: they do no harm, and a few hundred
# bytes can well be a long row of spaces.
FREE_BYTES = 1 << 24
# The largest window that the Zstandard library accepts. Files of `zstd --long=31` need it.
_WINDOW = 1 << 31
# The magic numbers of Zstandard frames (RFC 8878, section 3.1): of a frame with content, and of a frame to skip, whose
# last four bits are free.
_FRAME, _SKIPPABLE_FRAME = 0xFD2FB528, 0x184D2A50
# First bytes -> the kind of a file that is not text and that cannot be unpacked here.
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive",
             b"Rar!\x1a\x07": "a rar archive", b"\x04\x22\x4d\x18": "an lz4 file", b"%PDF-": "a PDF"}  # fmt: skip
# What a tar archive has at byte 257, after a file name: the magic of POSIX and the magic of GNU.
_TAR = (b"ustar\0", b"ustar  \0")


@contextlib.contextmanager
def open_unpacked(file: SourceFile, reading: Reading, stats: ReadStats) -> Iterator[io.BufferedReader]:
    """Opens a file as a stream of its uncompressed bytes. A file that is not compressed is opened as it is.

    Reading the stream increases `stats.bytes_read` by the bytes that were read from the disk. `UserError` is raised,
    also later while the stream is read, if the file is damaged, is an archive, needs a package that is not installed,
    or unpacks to more than `reading.max_expansion` allows.
    """
    try:
        with open(file.path, "rb") as start:
            head = start.read(16)
    except OSError as error:
        raise _unreadable(file, error) from None
    suffix = os.path.splitext(file.path)[1].lower()
    known = [name for name, (magic, _) in COMPRESSIONS.items() if re.match(magic, head)]
    # The content decides; the suffix counts only for a file whose first bytes say nothing.
    name = next(iter(known), suffix if suffix in COMPRESSIONS else "")
    errors: tuple[type[Exception], ...] = (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        *_zstandard_errors(),
    )
    try:
        with contextlib.ExitStack() as stack:
            raw: Any = stack.enter_context(_CountingFile(file.path, stats))
            if name:
                unpack = COMPRESSIONS[name][1](file)
                if not known:
                    raise OSError(f"it is {'empty' if not head else f'no {name} file'}")
                limit = max(FREE_BYTES, reading.max_expansion * file.size)
                raw = stack.enter_context(_Limited(unpack(raw), file, reading, limit))
            stream = stack.enter_context(io.BufferedReader(raw, _BUFFER))
            # An archive may be compressed, so this looks at the unpacked bytes.
            refuse_archives(stream.peek(512), file, unpacked=bool(name))
            yield stream
    # What the caller does with the stream may raise here, too, and a `UserError` has its sentence already.
    except UserError:
        raise
    except errors as error:
        raise _unreadable(file, error) from None


def _unreadable(file: SourceFile, error: Exception) -> UserError:
    """The error for a file that is damaged or that the system refuses to read."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return UserError(f"data.sources names {file.path!r}, which cannot be read ({text}): repair or remove it.")


def refuse_archives(head: bytes, file: SourceFile, unpacked: bool = False) -> None:
    """Raises `UserError` if the first bytes of a file show that it is an archive, or another file that is not text.

    `unpacked` says that the bytes come out of a compressed file, which must not be compressed once more.
    """
    kinds = [kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)]
    kinds += ["a tar archive"] if head[257:].startswith(_TAR) else []
    if unpacked and any(re.match(magic, head) for magic, _ in COMPRESSIONS.values()):
        kinds.append("compressed twice")
    if kinds:
        raise UserError(
            f"data.sources names {file.path!r}, which is {kinds[0]}: unpack it and name the text in it."
        )


class _CountingFile(io.FileIO):
    """A raw file that adds what is read from it to `stats.bytes_read`."""

    def __init__(self, path: str, stats: ReadStats):
        super().__init__(path, "rb")
        self._stats = stats

    def readinto(self, buffer) -> int | None:
        count = super().readinto(buffer)
        self._stats.bytes_read += count or 0
        return count


class _Limited(io.RawIOBase):
    """A stream of what `inner` reads. It raises `UserError` after more than `limit` bytes."""

    def __init__(self, inner: Any, file: SourceFile, reading: Reading, limit: int):
        self._inner, self._file, self._reading, self._left = inner, file, reading, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            most = self._reading.max_expansion
            raise UserError(
                f"data.max_expansion={most} and {self._file.path!r} of {self._file.size:,} bytes unpacks to more "
                f"than {most} times its size: raise data.max_expansion if the file is in order, or remove the file."
            )
        return len(data)


class _Members:
    """Reads compressed members that lie one after the other, each with a decompressor of its own.

    raw      the stream of compressed bytes
    make     makes a decompressor as the modules bz2 and lzma have it, with `decompress(data, max_length)`, `eof`,
             `needs_input` and `unused_data`
    padding  bytes that may lie between members and are passed over
    """

    def __init__(self, raw: io.RawIOBase, make: Callable[[], Any], padding: bytes):
        self._raw, self._make, self._padding = raw, make, padding
        # The decompressor of the member that is being read, and compressed bytes that it has not had yet.
        self._member, self._rest = make(), b""

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end. Raises EOFError if the last member is cut short."""
        while True:
            if self._member.eof:
                # What the finished member did not use is the beginning of the next one, after the padding.
                rest = self._member.unused_data
                while not (rest := rest.lstrip(self._padding)):
                    if not (rest := self._raw.read(_BLOCK) or b""):
                        return b""
                self._member, self._rest = self._make(), rest
            elif self._member.needs_input and not self._rest:
                self._rest = self._raw.read(_BLOCK) or b""
                if not self._rest:
                    raise EOFError("it is cut short")
            data = self._member.decompress(self._rest, size)
            self._rest = b""
            # A member may need more input before it has output, and no bytes would mean the end.
            if data:
                return data


# Each of the following returns a function that turns a stream of compressed bytes into an object with `read(size)`.


def _gzip(file: SourceFile) -> Callable[[io.RawIOBase], Any]:
    return lambda raw: gzip.GzipFile(fileobj=io.BufferedReader(raw))


def _bzip2(file: SourceFile) -> Callable[[io.RawIOBase], Any]:
    return lambda raw: _Members(raw, bz2.BZ2Decompressor, padding=b"\0")


def _xz(file: SourceFile) -> Callable[[io.RawIOBase], Any]:
    return lambda raw: _Members(raw, lzma.LZMADecompressor, padding=b"\0")


def _zstandard(file: SourceFile) -> Callable[[io.RawIOBase], Any]:
    try:
        import zstandard
    except ImportError:
        raise missing_package(file, "zstandard") from None

    def unpack(raw: Any) -> Any:
        _check_frames(file.path)
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        return decompressor.stream_reader(raw, read_across_frames=True)

    return unpack


def _zstandard_errors() -> tuple[type[Exception], ...]:
    """The exceptions of the package zstandard, if it is installed."""
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _check_frames(path: str) -> None:
    """Raises EOFError or OSError unless the file consists of whole Zstandard frames (RFC 8878).

    The library accepts a frame that is cut short as if it ended there, so this function looks for the end of each
    frame. It only reads the lengths that frames and blocks begin with, and unpacks nothing.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(18)
            (magic,) = struct.unpack("<I", head[:4].ljust(4, b"\0"))
            if magic & 0xFFFFFFF0 == _SKIPPABLE_FRAME:
                # Such a frame has its length after the magic number. A length that is missing counts as too long.
                at += 8 + struct.unpack("<I", head[4:8].ljust(4, b"\xff"))[0]
                continue
            if len(head) < 4 or magic != _FRAME:
                # A beginning of the magic number is the start of a frame that is cut short. Other bytes are foreign.
                cut = struct.pack("<I", _FRAME).startswith(head)
                raise (
                    EOFError("it is cut short")
                    if cut
                    else OSError("it ends in bytes that are none of its own")
                )
            if len(head) < 6:
                raise EOFError("it is cut short")
            # The frame header (section 3.1.1.1): flags, window size (unless the frame is a single segment), dictionary
            # ID, content size.
            flags = head[4]
            single, checksum = flags >> 5 & 1, flags >> 2 & 1
            content_size = (1 if single else 0, 2, 4, 8)[flags >> 6]
            at += 5 + (not single) + (0, 1, 2, 4)[flags & 3] + content_size
            # The blocks (section 3.1.1.2). Each has a header of 3 bytes: 1 bit for the last block, 2 bits for the kind,
            # and the length. A block of kind 1 is one byte that is repeated.
            last = False
            while not last:
                file.seek(at)
                block = file.read(3)
                if len(block) < 3:
                    raise EOFError("it is cut short")
                word = int.from_bytes(block, "little")
                last, kind, length = bool(word & 1), word >> 1 & 3, word >> 3
                at += 3 + (1 if kind == 1 else length)
            at += 4 * checksum
        # To seek beyond the end of a file is no error, so a cut within the last block or checksum shows only here.
        if at > size:
            raise EOFError("it is cut short")


def missing_package(file: SourceFile, package: str) -> UserError:
    """The error for a file that needs a package that is not installed."""
    return UserError(
        f"data.sources names {file.path!r}, which needs the package {package}: run "
        "pip install 'llmjax[data]'."
    )


# Suffix -> a pattern of the first bytes of every such file, and the function that unpacks it.
COMPRESSIONS: dict[str, tuple[bytes, Callable[[SourceFile], Callable[[io.RawIOBase], Any]]]] = {
    ".gz": (rb"\x1f\x8b", _gzip),
    ".zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstandard),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _bzip2),
    ".xz": (rb"\xfd7zXZ\x00", _xz),
}
