"""Compressed files as plain bytes: gzip, Zstandard, bzip2 and xz, of one or several members.

What is cut short, or followed by bytes that are none of its own, is an error. The first bytes of a file say how it is
compressed; where they say nothing and the suffix of its name promises something, the file is damaged.
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

_BUFFER = 1 << 20
# What every compressed file may unpack to, however small it is.
FREE_BYTES = 1 << 24
# The largest window that Zstandard has.
_WINDOW = 1 << 31
# First bytes -> what a file is that holds others, or is compressed by a program that is not known here.
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a rar archive",
             b"\x04\x22\x4d\x18": "an lz4 file", b"%PDF-": "a PDF"}  # fmt: skip


@contextlib.contextmanager
def open_unpacked(file: SourceFile, reading: Reading, stats: ReadStats) -> Iterator[io.BufferedReader]:
    """The file's uncompressed bytes; reading advances `stats.bytes_read` by bytes on disk. `UserError` for damage."""
    with open(file.path, "rb") as start:
        head = start.read(16)
    suffix = os.path.splitext(file.path)[1].lower()
    known = [name for name, (magic, _) in COMPRESSIONS.items() if re.match(magic, head)]
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
            refuse_archives(stream.peek(512), file)
            yield stream
    except UserError:
        raise
    except errors as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"data.sources names {file.path!r}, which cannot be read ({text}): repair or remove it."
        ) from None


def refuse_archives(head: bytes, file: SourceFile) -> None:
    """Raises `UserError` where the first bytes are of a format that holds no text as it is."""
    kinds = [kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)]
    kinds += ["a tar archive"] if head[257:262] == b"ustar" else []
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
    """What `inner` reads, up to a limit, beyond which it raises `UserError`."""

    def __init__(self, inner: Any, file: SourceFile, reading: Reading, limit: int):
        self._inner, self._file, self._reading, self._left = inner, file, reading, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"data.max_expansion={self._reading.max_expansion} and {self._file.path!r} of {self._file.size:,} "
                "bytes unpacks to more than so many times its size: raise data.max_expansion if it is what it "
                "should be, or remove the file."
            )
        return len(data)


class _Members:
    """Members one after the other, each read by a decompressor of its own.

    `make` gives one with `decompress(data, max_length)`, `eof`, `needs_input` and `unused_data`. Bytes of `padding` may
    lie between members.
    """

    def __init__(self, raw: io.RawIOBase, make: Callable[[], Any], padding: bytes):
        self._raw, self._make, self._padding = raw, make, padding
        self._member, self._rest = make(), b""

    def read(self, size: int) -> bytes:
        while True:
            if self._member.eof:
                rest = self._member.unused_data
                while not (rest := rest.lstrip(self._padding)):
                    if not (rest := self._raw.read(1 << 16) or b""):
                        return b""
                self._member, self._rest = self._make(), rest
            elif self._member.needs_input and not self._rest:
                self._rest = self._raw.read(1 << 16) or b""
                if not self._rest:
                    raise EOFError("it is cut short")
            data = self._member.decompress(self._rest, size)
            self._rest = b""
            if data:
                return data


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
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _check_frames(path: str) -> None:
    """Raises EOFError or OSError unless the file is a row of whole frames (RFC 8878).

    The library reads a frame that is cut short as if it ended there. Frames consist of blocks that say how long they
    are, and nothing is unpacked to see whether all of them are there.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(18)
            (magic,) = struct.unpack("<I", head[:4].ljust(4, b"\0"))
            if magic & 0xFFFFFFF0 == 0x184D2A50:  # a frame to skip, which says its length
                at += 8 + struct.unpack("<I", head[4:8].ljust(4, b"\xff"))[0]
                continue
            if len(head) < 4 or magic != 0xFD2FB528:
                # The beginning of the first four bytes is a cut, anything else was never part of the file.
                cut = struct.pack("<I", 0xFD2FB528).startswith(head)
                raise (
                    EOFError("it is cut short")
                    if cut
                    else OSError("it ends in bytes that are none of its own")
                )
            if len(head) < 6:
                raise EOFError("it is cut short")
            flags = head[4]
            single, checksum = flags >> 5 & 1, flags >> 2 & 1
            content_size = (1 if single else 0, 2, 4, 8)[flags >> 6]
            at += 5 + (not single) + (0, 1, 2, 4)[flags & 3] + content_size
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
        if at > size:
            raise EOFError("it is cut short")


def missing_package(file: SourceFile, package: str) -> UserError:
    """The error for a file that needs a package that is not installed."""
    return UserError(
        f"data.sources names {file.path!r}, which needs the package {package}: run "
        "pip install 'llmjax[data]'."
    )


# Suffix -> a pattern of the first bytes of every such file, and what unpacks it.
COMPRESSIONS: dict[str, tuple[bytes, Callable[[SourceFile], Callable[[io.RawIOBase], Any]]]] = {
    ".gz": (rb"\x1f\x8b", _gzip),
    ".zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstandard),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _bzip2),
    ".xz": (rb"\xfd7zXZ\x00", _xz),
}
