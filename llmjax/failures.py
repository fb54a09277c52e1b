"""Turns errors of the operating system (a full disk, missing permissions, no memory) into one sentence with a remedy.

The command line prints such a sentence instead of a traceback, wherever the error occurred.
"""

from __future__ import annotations

import errno
import os
import re

from llmjax.errors import UserError
from llmjax.names import plain_name

# Exit codes. REFUSED: the request cannot be carried out. FAILED: something failed on the way.
REFUSED, FAILED = 2, 1
_ELSEWHERE = "give another path"
_ROOM = "free some room or give another path, and start again"
# errno -> (exit code, what is wrong with the file, what to do about it).
_REASONS = {
    errno.EACCES: (
        REFUSED,
        "cannot be used (permission denied)",
        "change its permissions or give another path",
    ),
    errno.EPERM: (
        REFUSED,
        "cannot be used (permission denied)",
        "change its permissions or give another path",
    ),
    errno.EROFS: (REFUSED, "cannot be written (its file system is read-only)", _ELSEWHERE),
    errno.ENOENT: (REFUSED, "does not exist", "restore it or give another path"),
    errno.ENOTDIR: (REFUSED, "cannot be used (a file is where a folder should be)", _ELSEWHERE),
    errno.EISDIR: (
        REFUSED,
        "cannot be used (a folder is where a file should be)",
        f"move it away or {_ELSEWHERE}",
    ),
    errno.EEXIST: (
        REFUSED,
        "cannot be used (something else is in its place)",
        f"move that away or {_ELSEWHERE}",
    ),
    errno.ENOTEMPTY: (REFUSED, "cannot be replaced (it is not empty)", f"move it away or {_ELSEWHERE}"),
    errno.ENAMETOOLONG: (REFUSED, "cannot be used (the name is too long)", "give a shorter path"),
    errno.ELOOP: (
        REFUSED,
        "cannot be used (its links lead in a circle)",
        "correct the links or give another path",
    ),
    errno.EBUSY: (REFUSED, "cannot be used (something else uses it)", _ELSEWHERE),
    errno.ENOSPC: (FAILED, "cannot be written (the disk is full)", _ROOM),
    errno.EDQUOT: (FAILED, "cannot be written (the quota is used up)", _ROOM),
    errno.EFBIG: (
        FAILED,
        "cannot be written (the file would be larger than is allowed)",
        "raise `ulimit -f`",
    ),
    errno.EMFILE: (FAILED, "cannot be opened (too many files are open)", "raise `ulimit -n`"),
    errno.ENFILE: (FAILED, "cannot be opened (too many files are open)", "close other programs"),
    errno.EIO: (
        FAILED,
        "cannot be read or written (the disk fails)",
        "save what can be saved and use another disk",
    ),
    errno.ESTALE: (FAILED, "cannot be used (the network disk lost it)", "mount the disk again"),
}

# XLA's message for missing device memory. The class of the error differs between versions of jax.
_DEVICE_MEMORY = re.compile(r"RESOURCE_EXHAUSTED: .*\bmemory\b", re.IGNORECASE)


def describe_failure(error: BaseException) -> tuple[int, str] | None:
    """(exit code, sentence) if `error` comes from the system or the user; None for anything else, such as a bug."""
    if isinstance(error, UserError):
        return REFUSED, str(error)
    if isinstance(error, UnicodeError):
        return (
            REFUSED,
            f"a text cannot be written or read ({plain_name(error)}); correct it, or run with PYTHONUTF8=1",
        )
    if isinstance(error, MemoryError):
        text = f" ({plain_name(error)})" if str(error) else ""
        return (
            FAILED,
            f"there is not enough memory{text}; close other programs, or lower what is read or held at once",
        )
    if isinstance(error, RecursionError):
        return FAILED, "something in a file or an argument is nested too deeply to be read; write it flatter"
    number = error.errno if isinstance(error, OSError) else _system_number(error)
    if number is None and _DEVICE_MEMORY.match(str(error)):
        return (
            FAILED,
            f"a device does not have enough memory ({plain_name(str(error).splitlines()[0])}); lower "
            "data.seq_len or what is evaluated or generated at once, raise compute.accumulation_steps or set "
            "compute.remat, and see with --mode=plan what fits",
        )
    if number is None and not isinstance(error, OSError):
        return None
    # The operating system's way to say what MemoryError says.
    if number == errno.ENOMEM:
        return describe_failure(MemoryError())
    named = error.filename if isinstance(error, OSError) else _quoted_path(error)
    name = plain_name(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else ""
    if number not in _REASONS:
        text = plain_name(getattr(error, "strerror", None) or error)
        return FAILED, f"{name or 'something'} cannot be used ({text}); {_ELSEWHERE}"
    code, reason, remedy = _REASONS[number]
    return code, f"{name or 'a file'} {reason}; {remedy}"


def _system_number(error: BaseException) -> int | None:
    """The errno that a library, such as TensorStore, wrote into the message of an error of its own class."""
    found = re.search(r"os[ _]error(?:_code)?[ ='\"]+(\d+)", str(error), re.IGNORECASE)
    return int(found[1]) if found else None


def _quoted_path(error: BaseException) -> str | None:
    """The first absolute path in the message of such an error."""
    found = re.search(r'"(/[^"]*)"', str(error))
    return found[1] if found else None
