"""Names of files and documents as a person can read them and every file format can hold them.

A file name on Linux is bytes. Python gives those that are not UTF-8 as lone surrogates, which can neither be printed
nor written, and a name may hold line ends and codes that a terminal obeys.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import unicodedata

from llmjax.errors import UserError


def plain_name(name: object) -> str:
    """`name` with everything escaped that is no text: `\\xff` for a byte that is not UTF-8, `\\n` for a line end."""
    name = str(name)
    return name if name.isprintable() else "".join(map(_escape, name))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    # Python calls spaces of other widths not printable, but they are text.
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def at_home(path: str | os.PathLike, key: str) -> pathlib.Path:
    """`path` with a leading `~` or `~user` replaced by that home folder. UserError, which names `key`, without one."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        reason = "begins with a home folder that is not known here"
        raise UserError(f"{key}={str(path)!r} {reason}; give the whole path") from None


def is_unicode(name: object) -> bool:
    """Whether UTF-8 can express `name`."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def quote(name: object) -> str:
    """`name` as one word of a shell, on one line; what is not printable as bash, zsh and ksh read it."""
    name = str(name)
    if name.isprintable():
        return shlex.quote(name)
    data = name.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in data) + "'"
