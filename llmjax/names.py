"""Names of files and documents in a form that people can read and every file format can store.

A file name on Linux consists of bytes. Python represents bytes that are not UTF-8 as lone surrogates, which can be
neither printed nor written. Names may also contain newlines and control characters that a terminal obeys.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import unicodedata

from llmjax.errors import UserError


def plain_name(name: object) -> str:
    """`name` with escapes for all that is not text: `\\xff` for a byte that is not UTF-8, `\\n` for a newline."""
    name = str(name)
    return name if name.isprintable() else "".join(map(_escape, name))


def _escape(character: str) -> str:
    code = ord(character)
    # Python's lone surrogate for the byte code - 0xDC00.
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    # Python counts spaces of other widths as not printable, but they are text.
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def check_local(path: str | os.PathLike, asked: str) -> None:
    """Raises UserError, which begins with `asked`, if `path` is an address such as gs://bucket/run.

    Files are locked, renamed in one step and mapped into memory, which the stores behind such addresses do not offer.
    """
    # pathlib makes one slash of two.
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        raise UserError(
            f"{asked} is an address and no path of this machine; mount the bucket (gcsfuse, mountpoint-s3) and give "
            "the path there"
        )


def at_home(path: str | os.PathLike, key: str) -> pathlib.Path:
    """`path` with a leading `~` or `~user` replaced by the home folder. Raises UserError, which names `key`, if the
    home folder is unknown, or if `path` is the address of a bucket."""
    check_local(path, f"{key}={str(path)!r}")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        reason = "begins with a home folder that is not known here"
        raise UserError(f"{key}={str(path)!r} {reason}; give the whole path") from None


def is_unicode(name: object) -> bool:
    """Whether UTF-8 can represent `name`."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def quote(name: object) -> str:
    """`name` quoted as one shell word on one line. Unprintable characters use the $'...' form of bash, zsh and ksh."""
    name = str(name)
    if name.isprintable():
        return shlex.quote(name)
    data = name.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in data) + "'"
