"""A cache of compiled programs on disk: a run that compiles what an earlier one compiled begins in seconds.

jax finds a program in its cache by everything that the program depends on, the versions of the libraries included. This
file adds what jax leaves to its users: a folder for each kind of processor, because machine code of one may not run on
another, a bound on the size, and digests. jax writes its files in place, so that a killed process may leave half of
one. An entry therefore counts only with its digest beside it, which is written when the entry is complete. Entries
without one, and those that a disk has damaged, are deleted before anything is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import platform
import re
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from llmjax.escapes import complain
from llmjax.files import write_atomically

# How jax names its files, and what is added to the name for the digest.
_ENTRIES, _DIGEST = "*-cache", ".digest"
# A choice: programs that compile faster are not kept. jax's own choice is a second, in which a small model compiles.
_MIN_SECONDS = 0.3
# A choice: an entry that was not written to for so many seconds is complete.
_SETTLED_SECONDS = 1.0
# The settings of jax that are changed, and the event by which it says that a program is compiled.
_FOLDER, _SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
_ENABLED = "jax_enable_compilation_cache"
_COMPILED = "/jax/core/compile/backend_compile_duration"
# Two threads may have compiled a program at the same time, and would write the same digests.
_SEALING = threading.Lock()


@contextlib.contextmanager
def reuse_programs(cache: pathlib.Path, megabytes: int) -> Iterator[None]:
    """A context manager in which compiled programs are looked up in the folder `cache`, and kept there.

    The newest entries are kept, of together at most `megabytes`; with 0 nothing is looked up or kept. A cache that the
    user has set up in jax itself, for example by JAX_COMPILATION_CACHE_DIR, is left as it is.
    """
    if not megabytes or getattr(jax.config, _FOLDER) is not None:
        yield
        return
    folder = cache / "compiled" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield
        # Only now: where the whole cache cannot be written to, a mode that needs it has said so.
        complain(f"compiled programs were not kept, as {folder} cannot be made ({error.strerror})")
        return
    with _one_sentence(folder):
        yield from _reuse(folder, megabytes)


def _reuse(folder: pathlib.Path, megabytes: int) -> Iterator[None]:
    """Yields once; until it goes on, jax looks compiled programs up in `folder`."""
    seconds = getattr(jax.config, _SECONDS)
    known = _clean(folder, megabytes << 20)

    def seal(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            _seal(folder, known, _SETTLED_SECONDS)

    jax.config.update(_FOLDER, str(folder))
    jax.config.update(_SECONDS, _MIN_SECONDS)
    compilation_cache.reset_cache()
    jax.monitoring.register_event_duration_secs_listener(seal)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(seal)
        jax.config.update(_FOLDER, None)
        jax.config.update(_SECONDS, seconds)
        compilation_cache.reset_cache()
        _seal(folder, known, 0.0)


@contextlib.contextmanager
def _one_sentence(folder: pathlib.Path) -> Iterator[None]:
    """A context manager in which jax's warnings of entries that it cannot write or read, one for each program, become
    one sentence. A folder that cannot be written to, or a full disk, costs the cache and not the run."""
    before, told = warnings.showwarning, set()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        match = re.match(
            r"Error (writ|read)ing persistent compilation cache entry for .+?: (.*)", str(message), re.S
        )
        if match is None:
            before(message, *where, **more)
        elif match[1] not in told:
            told.add(match[1])
            fault = {"writ": "kept, as files cannot be written", "read": "used, as files cannot be read"}[
                match[1]
            ]
            complain(
                f"compiled programs are not {fault} in {folder} ({' '.join(match[2].split())}); correct that, or set "
                "compute.compilation_cache_mb=0"
            )

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """A context manager in which jax looks up and keeps no compiled program, whatever cache the user has set up.

    A program for devices that are not there cannot be read back, and one that was read back does not tell all that
    compiling it tells.
    """
    before = getattr(jax.config, _ENABLED)
    jax.config.update(_ENABLED, False)
    # jax asks only once whether there is a cache, and this makes it ask again.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(_ENABLED, before)
        compilation_cache.reset_cache()


def _clean(folder: pathlib.Path, limit: int) -> set[str]:
    """Deletes entries that are not whole, and the oldest ones above `limit` bytes; the names of those that stay."""
    whole: set[str] = set()
    total = 0
    newest_first = sorted(folder.glob(_ENTRIES), key=lambda path: -_modified(path))
    for path in newest_first:
        # Another process may be cleaning the same folder.
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            # Bytes, because a damaged digest need not be text.
            if total + size <= limit and _digest_file(path).read_bytes() == _digest(path).encode():
                whole.add(path.name)
                total += size
    for path in newest_first:
        if path.name not in whole:
            for each in (path, _digest_file(path)):
                with contextlib.suppress(OSError):
                    each.unlink()
    return whole


def _seal(folder: pathlib.Path, known: set[str], settled: float) -> None:
    """Writes the digests of entries that are new since `known`, which they are added to.

    An entry that was written to in the last `settled` seconds may not be complete and waits for the next time.
    """
    for path in folder.glob(_ENTRIES):
        # A full disk or a folder that may not be written to costs the cache, not the run.
        with contextlib.suppress(OSError), _SEALING:
            if path.name not in known and time.time() - _modified(path) >= settled:
                write_atomically(_digest_file(path), _digest(path))
                known.add(path.name)


def _digest_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + _DIGEST)


def _digest(path: pathlib.Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _modified(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _processor() -> str:
    """A name for this kind of processor: its architecture and a hash of its instruction sets."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        # x86 calls them flags, ARM Features. All cores have the same line.
        kinds = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        kinds = platform.processor()
    return f"{platform.machine()}-{hashlib.blake2b(kinds.encode(), digest_size=6).hexdigest()}"
