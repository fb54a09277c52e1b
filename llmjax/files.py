"""Writes files and folders atomically: they appear complete or not at all. All writes to workdirs and caches use it.

Content is written under a temporary name beside its destination, synced to disk, and then renamed. A reader sees
either the old or the new content, even after a power failure, and a writer that fails leaves nothing behind. What a
killed writer leaves is deleted by a later one. Permissions follow the umask, so that users can share a cache. Files
that grow line by line (metrics.jsonl, TensorBoard events) are written elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# Part of the temporary name, after the name of the destination.
UNFINISHED = ".building-"
# A writer that has written nothing for this long (6 hours, a choice) counts as dead.
STALE_SECONDS = 6 * 3600


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Replaces the file `path` by `data` in one step, and makes its folder if necessary.

    Text is written as UTF-8. A lone surrogate, which stands for a byte of a file name that is not UTF-8, becomes
    `\\udcXX`, which JSON can read back. Raises OSError, whose `filename` is always `path`.
    """
    path = Path(path)
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        unfinished = _beside(path)
        try:
            # "x" fails if the file exists. fsync before the rename: the name must never refer to data that is not on
            # disk.
            with open(unfinished, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        # Ctrl-C and SystemExit, too, must not leave the temporary file behind.
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """A context manager that yields an empty folder to fill. On exit it is renamed to `folder`, complete and synced
    to disk.

    Several writers of the same folder do not disturb each other: a folder that exists by then stays if `is_whole`
    accepts it. Otherwise, whether a damaged folder or a file, it is replaced. On an error nothing changes.
    """
    folder = Path(folder)
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        unfinished = _beside(folder)
        # The rename at the end is atomic, as the folder lies on the same disk.
        unfinished.mkdir()
        try:
            yield unfinished
            for path in unfinished.iterdir():
                _sync(path)
            _sync_folder(unfinished)
            _put_in_place(unfinished, folder, is_whole)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _sync_folder(folder.parent)


def remove_stale(path: Path) -> None:
    """Deletes temporary files and folders of killed writers of `path`: those not modified for STALE_SECONDS."""
    for unfinished in path.parent.glob(f"{_stem(path)}{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            inside = unfinished.iterdir() if unfinished.is_dir() else ()
            if time.time() - max(p.stat().st_mtime for p in [unfinished, *inside]) > STALE_SECONDS:
                _delete(unfinished)


def _put_in_place(unfinished: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    """Renames a finished folder to its destination. An existing folder is moved aside first and deleted last."""
    try:
        os.replace(unfinished, folder)
        return
    except OSError:
        if not os.path.lexists(folder):
            raise
    if is_whole(folder):
        # Another writer was faster, and a reader may be using its folder by now.
        return
    aside = _beside(folder)
    # Another writer may have moved it a moment ago.
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder, aside)
    try:
        os.replace(unfinished, folder)
    except OSError:
        # If another writer was faster, its folder is as good as this one.
        if not folder.is_dir():
            raise
    finally:
        _delete(aside)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context manager that gives an OSError the name of the destination instead of the temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (
            error.filename is not None and UNFINISHED not in os.fsdecode(error.filename)
        ):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _beside(path: Path) -> Path:
    """A new temporary name in the same folder, so that renaming stays on the same disk."""
    return path.with_name(f"{_stem(path)}{UNFINISHED}{uuid.uuid4().hex[:12]}")


def _stem(path: Path) -> str:
    """The name without glob characters, cut to 50 characters so that the temporary name fits into 255 bytes."""
    return "".join(c if c not in "*?[]" else "_" for c in path.name[:50])


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    # Some file systems cannot sync a folder, and some systems cannot open one.
    with contextlib.suppress(OSError):
        _sync(folder)
