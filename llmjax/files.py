"""Files and folders that appear whole or not at all: the one writer of workdirs and caches.

What is written lies beside its place under another name until every byte of it is on disk, and is then renamed. A
reader sees the old content or the new one, also after a power cut, and a writer that fails leaves nothing behind. What
a killed writer leaves is deleted by a later one. Permissions follow the umask, so that users can share a cache.
Files that grow line by line (metrics.jsonl, TensorBoard events) are not written here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# In the names of what is not whole yet, after the name of what it will be.
UNFINISHED = ".building-"
# A writer that wrote nothing for so long is dead.
STALE_SECONDS = 6 * 3600


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
    """Replaces the file `path` by `data` in one step; its folder is made if need be.

    Text is written in UTF-8. A lone surrogate, which stands for a byte of a file name that is not UTF-8, becomes
    `\\udcXX`, which JSON reads back. Raises OSError, whose `filename` is `path` whatever went wrong.
    """
    path = Path(path)
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        unfinished = _beside(path)
        try:
            with open(unfinished, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives an empty folder to fill; on leaving it takes the name `folder`, whole and on disk.

    Writers of the same folder do not disturb each other: what stands there by then stays if `is_whole` says so, and is
    replaced otherwise, be it a damaged folder or a file. On an error nothing changes.
    """
    folder = Path(folder)
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        unfinished = _beside(folder)
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
    """Deletes what killed writers of `path` left behind, known by nothing having been written for hours."""
    for unfinished in path.parent.glob(f"{_stem(path)}{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            inside = unfinished.iterdir() if unfinished.is_dir() else ()
            if time.time() - max(p.stat().st_mtime for p in [unfinished, *inside]) > STALE_SECONDS:
                _delete(unfinished)


def _put_in_place(unfinished: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    """Renames a finished folder. What is there is moved aside first, and deleted last."""
    try:
        os.replace(unfinished, folder)
        return
    except OSError:
        if not os.path.lexists(folder):
            raise
    if is_whole(folder):
        return  # another writer was faster, and somebody may be reading it by now
    aside = _beside(folder)
    with contextlib.suppress(FileNotFoundError):  # another writer moved it a moment ago
        os.replace(folder, aside)
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another writer was faster, whose folder is as good
            raise
    finally:
        _delete(aside)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, an OSError of writing gets the name of the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (
            error.filename is not None and UNFINISHED not in os.fsdecode(error.filename)
        ):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _beside(path: Path) -> Path:
    """A new name in the same folder, and so on the same disk."""
    return path.with_name(f"{_stem(path)}{UNFINISHED}{uuid.uuid4().hex[:12]}")


def _stem(path: Path) -> str:
    """The name, cut so that the addition fits into the 255 bytes of a name; free of what a glob would expand."""
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
    with contextlib.suppress(OSError):  # some filesystems cannot, and some systems have no such handle
        _sync(folder)
