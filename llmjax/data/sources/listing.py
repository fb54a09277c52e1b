"""Finds the files that data.sources names: files, folders, globs, and the standard library of this Python.

Symbolic links are treated as follows. A link that data.sources names itself is followed. In a folder that is searched,
a link to something inside that folder is followed, and a link that leads out of it only if `follow_links` is set. Every
file is listed once, even if several names lead to it. What is left out is counted by the reason.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fnmatch
import glob
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llmjax.data.sources.fingerprint import file_digest
from llmjax.data.sources.formats import COMMA_SUFFIXES, JSON_SUFFIXES, TAB_SUFFIXES, format_of, suffix_of
from llmjax.errors import UserError
from llmjax.names import check_local

# The source that stands for the standard library, a corpus of code that is on every machine.
STDLIB = "stdlib"
# Folders in the standard library's folder whose files are not part of it: tests, and packages that were installed.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

# The reasons for which something in a folder is left out. They follow a number, as in "3 hidden".
UNKNOWN_SUFFIX = "of unknown suffix"
HIDDEN = "hidden"
LEADS_OUT = "links that lead out of the folder"
BROKEN = "links that lead nowhere"
NO_FILE = "neither files nor folders"
NO_FIELD = "JSON without the text field"
NO_COLUMN = "tables without a column for the text"
# Suffix -> the reason for which such a file in a folder is left out if it has no text.
_WITHOUT_TEXT = {
    **dict.fromkeys(JSON_SUFFIXES, NO_FIELD),
    **dict.fromkeys((*COMMA_SUFFIXES, *TAB_SUFFIXES), NO_COLUMN),
}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the corpus.

    name      its path relative to the source that it was found in, which is the same on every machine
    path      where the file lies on this machine
    size      bytes on disk
    digest    a hash of the content, see `file_digest`
    origin    the first entry of data.sources that names the file, counted from 0; those of data.held_out_sources follow
    held_out  whether data.held_out_sources name the file
    """

    name: str
    path: str
    size: int
    digest: str
    origin: int = 0
    held_out: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """The result of a search.

    files     the files of the corpus, sorted by name
    left_out  the number of things that were left out, by the reason
    """

    files: tuple[SourceFile, ...]
    left_out: Mapping[str, int]


def list_sources(sources: Sequence[str], *, follow_links: bool = False) -> tuple[SourceFile, ...]:
    """The files that `search_sources` finds if every file of JSON and every table counts as a corpus."""
    return search_sources(sources, follow_links=follow_links).files


def search_sources(
    sources: Sequence[str],
    *,
    follow_links: bool = False,
    has_text: Callable[[str], bool] = lambda path: True,
    digest_of: Callable[[str], str] = file_digest,
    progress: Callable[[int, int], None] = lambda done, total: None,
    key: str = "data.sources",
) -> Listing:
    """Lists the files that the sources name, each once.

    A source is one of these:
      a file, whatever its suffix;
      a folder, which is searched for files with a known suffix that are not hidden;
      a glob, also with `**`, which matches what it would match in a shell;
      `stdlib`, the Python sources of the standard library.

    Args:
      sources: the sources, in order.
      follow_links: whether to follow links that lead out of a folder that is searched.
      has_text: says of the path of a .json file or a table in a folder whether it is a corpus. Many are settings or
        the like.
      digest_of: returns the digest of the content of the file at a path.
      progress: called as progress(done, total), in bytes, while files are read for their digests.
      key: the key of the config that names the sources, for messages.

    Raises `UserError` if a source does not exist or has no files, or if a folder cannot be read.
    """
    if isinstance(sources, str):
        raise UserError(f"{key} = {sources!r} is one string: give a list of sources.")
    # Real path -> (name, path, size, origin) of a file.
    found: dict[str, tuple[str, str, int, int]] = {}
    # Path -> the reason for leaving it out. Links in a folder can lead to the same path twice, and so can two sources.
    left_out: dict[str, str] = {}
    for origin, source in enumerate(sources):
        search = _Search(follow_links, has_text, key)
        for name, path in search.expand(source):
            # Files are told apart by where they really lie, whatever links lead there.
            real = os.path.realpath(path)
            if real not in found:
                with _said_if_unreadable(path, key):
                    found[real] = name, path, os.stat(path).st_size, origin
        left_out.update(search.left_out)
    if not found:
        raise UserError(f"{key} is empty: name files, directories or globs, or stdlib.")
    # Only now is it known how much there is to read for the digests.
    files, done, total = [], 0, sum(size for _, _, size, _ in found.values())
    for name, path, size, origin in sorted(found.values()):
        progress(done, total)
        with _said_if_unreadable(path, key):
            files.append(SourceFile(name, path, size, digest_of(path), origin))
        done += size
    # What one source leaves out, another may name.
    reasons = collections.Counter(reason for path, reason in left_out.items() if path not in found)
    return Listing(tuple(files), dict(reasons))


def split_sources(text: str) -> tuple[str, ...]:
    """Splits a text at its commas into sources. A comma is part of a name if a file of that name exists."""
    parts, names = text.split(","), []
    while parts:
        # The longest name that exists comes first. If none exists, the name ends at the next comma.
        joined = (",".join(parts[:count]) for count in range(len(parts), 1, -1))
        name = next((name for name in joined if os.path.lexists(os.path.expanduser(name))), parts[0])
        parts = parts[name.count(",") + 1 :]
        names += [name] if name else []
    return tuple(names)


class _Search:
    """The search for the files of one source. `left_out` has the path and the reason of what was left out."""

    def __init__(self, follow_links: bool, has_text: Callable[[str], bool], key: str):
        self._follow_links, self._has_text, self._key = follow_links, has_text, key
        self.left_out: dict[str, str] = {}

    def _leave_out(self, path: str, reason: str) -> None:
        folder, name = os.path.split(path)
        self.left_out[os.path.join(os.path.realpath(folder), name)] = reason

    def expand(self, source: str) -> list[tuple[str, str]]:
        """(name, path) of each file that `source` names. Raises `UserError` if there are none."""
        if source == STDLIB:
            return _stdlib_files()
        check_local(source, f"{self._key} names {source!r}, which")
        path = os.path.expanduser(source)
        if os.path.isfile(path):
            return [(os.path.basename(path), path)]
        if os.path.isdir(path):
            files = self._corpus_in(path)
            if not files:
                raise UserError(
                    f"{self._key} names {source!r}, a directory without text, JSON, tables or "
                    f".parquet files{self._said()}: name the files themselves if their suffix is unusual."
                )
            return files
        if not glob.has_magic(path):
            raise _no_source(self._key, source, path)
        root, segments = _fixed_part(path)
        files = []
        for match in sorted(self._match(root, segments, os.path.realpath(root))):
            inside = []
            # A folder that matches is searched, as if it had been named. `**` has gone through all folders already.
            if os.path.isdir(match) and "**" not in segments:
                inside = [found for _, found in self._corpus_in(match)]
            for found in [match] if os.path.isfile(match) else inside:
                files.append((os.path.relpath(found, root).replace(os.sep, "/"), found))
        if not files:
            raise UserError(
                f"{self._key} names {source!r}, which matches no file{self._said()}: check the pattern."
            )
        return files

    def _said(self) -> str:
        """What was left out, for an error about a source without files, or nothing."""
        reasons = collections.Counter(self.left_out.values())
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        said += "; --config.data.follow_links=true follows links" if LEADS_OUT in reasons else ""
        said += (
            "; --config.data.text_field=NAME names the field" if {NO_FIELD, NO_COLUMN} & {*reasons} else ""
        )
        return f" (left out: {said})" if said else ""

    def _corpus_in(self, root: str) -> list[tuple[str, str]]:
        """(name, path) of the files in a folder that are part of the corpus."""
        kept = []
        for name, path in self._walk(root):
            if format_of(name) is None:
                self._leave_out(path, UNKNOWN_SUFFIX)
            elif suffix_of(name) in _WITHOUT_TEXT and not self._has_text(path):
                self._leave_out(path, _WITHOUT_TEXT[suffix_of(name)])
            else:
                kept.append((name, path))
        return kept

    def _walk(self, root: str) -> list[tuple[str, str]]:
        """(name relative to `root`, path) of all files in a folder and in the folders below it.

        Files and folders come before links. A file that lies in the folder is therefore listed by its own name, even
        if a link leads to it. Each file and each folder is visited once, so links cannot lead in a circle.
        """
        top = os.path.realpath(root)
        seen: set[str] = {top}
        found: list[tuple[str, str]] = []
        # What is still to be visited: (path, real path, beginning of the names) of folders, (path, name) of links.
        folders = collections.deque([(root, top, "")])
        links: collections.deque[tuple[str, str]] = collections.deque()

        def visit(path: str, real: str, name: str, is_folder: bool) -> None:
            """Notes a file or a folder that was not visited before."""
            if real in seen:
                return
            seen.add(real)
            if is_folder:
                folders.append((path, real, f"{name}/"))
            else:
                found.append((name, path))

        while folders or links:
            if not folders:
                path, name = links.popleft()
                visit(path, os.path.realpath(path), name, os.path.isdir(path))
                continue
            folder, real_folder, prefix = folders.popleft()
            for entry in sorted(_scan(folder, self._key), key=lambda entry: entry.name):
                name = prefix + entry.name
                if entry.name.startswith("."):
                    self._leave_out(entry.path, HIDDEN)
                elif entry.is_symlink():
                    if self._may_follow(entry.path, top):
                        links.append((entry.path, name))
                elif entry.is_dir() or entry.is_file():
                    visit(entry.path, os.path.join(real_folder, entry.name), name, entry.is_dir())
                else:
                    self._leave_out(entry.path, NO_FILE)
        return found

    def _may_follow(self, link: str, top: str) -> bool:
        """Whether a link that was found below the real path `top` is followed. If it is not, it is counted."""
        if not os.path.exists(link):
            self._leave_out(link, BROKEN)
            return False
        real = os.path.realpath(link)
        if self._follow_links or real == top or real.startswith(top.rstrip(os.sep) + os.sep):
            return True
        self._leave_out(link, LEADS_OUT)
        return False

    def _match(self, folder: str, segments: Sequence[str], top: str) -> Iterator[str]:
        """The paths below `folder` that the segments of a glob match, without hidden ones.

        `top` is the real path of the folder where the glob begins, which links must not lead out of.
        """
        if not segments:
            yield folder
            return
        segment, *rest = segments
        if segment == "**":
            # `_walk` finds all files in folders that are not hidden and visits each folder once, so that links in a
            # circle come to an end. `**` at the end of a glob matches files, too.
            names = [name for name, _ in self._walk(folder)]
            rest = [*rest, "*"] if not rest or rest[-1] == "**" else rest
            for name in names:
                if _matches(name.split("/"), ["**", *rest]):
                    yield os.path.join(folder, *name.split("/"))
            return
        # A segment that is a plain name is followed even if it is a link, because it was named itself.
        if not glob.has_magic(segment):
            path = os.path.join(folder, segment)
            if os.path.lexists(path) and (not rest or os.path.isdir(path)):
                yield from self._match(path, rest, top)
            return
        for entry in sorted(_scan(folder, self._key), key=lambda entry: entry.name):
            if not fnmatch.fnmatchcase(entry.name, segment):
                continue
            if entry.name.startswith(".") and not segment.startswith("."):
                self._leave_out(entry.path, HIDDEN)
            elif (not entry.is_symlink() or self._may_follow(entry.path, top)) and (
                not rest or entry.is_dir()
            ):
                yield from self._match(entry.path, rest, top)


def _matches(parts: Sequence[str], segments: Sequence[str]) -> bool:
    """Whether the segments of a glob match the parts of a path. `**` matches zero or more parts."""
    if not segments:
        return not parts
    segment, *rest = segments
    if segment == "**":
        return any(_matches(parts[skip:], rest) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], segment) and _matches(parts[1:], rest)


def _scan(folder: str, key: str) -> list[os.DirEntry]:
    """What lies in a folder. Raises `UserError` if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"{key}: the folder {folder!r} cannot be read ({error.strerror}): change its permissions, or name "
            "the other files and folders beside it one by one."
        ) from None


@contextlib.contextmanager
def _said_if_unreadable(path: str, key: str) -> Iterator[None]:
    """Turns an error of the system about a file into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{key}: the file {path!r} cannot be read ({error.strerror}): change its permissions, or take it out of "
            f"what {key} names."
        ) from None


def _no_source(key: str, source: str, path: str) -> UserError:
    """The error for a source that is neither a file nor a folder at `path`, nor a glob."""
    try:
        os.stat(path)
        problem, remedy = "is neither a file nor a folder", "write its text to a file and name that"
    except (FileNotFoundError, NotADirectoryError, ValueError):
        is_link = os.path.islink(path)
        problem, remedy = ("is a link that leads nowhere" if is_link else "does not exist"), "check the path"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        remedy = "check the path, its links, and the permissions of the folders in it"
    return UserError(f"{key} names {source!r}, which {problem}: {remedy}.")


def _stdlib_files() -> list[tuple[str, str]]:
    """(name, path) of the Python sources of the standard library."""
    root, found = sysconfig.get_paths()["stdlib"], []
    for folder, _, files in os.walk(root):
        for file in files:
            path = os.path.join(folder, file)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            if _is_stdlib(name) and os.path.isfile(path):
                found.append((name, path))
    return found


def _is_stdlib(name: str) -> bool:
    """Whether a file in the standard library's folder is a Python source of the library itself.

    Tests, installed packages, and the record of how this interpreter was built do not count.
    """
    *folders, file = name.split("/")
    return (
        file.endswith(".py")
        and not file.startswith("_sysconfigdata")
        and not any(f in _NOT_STDLIB or f.startswith("config-") for f in folders)
    )


def _fixed_part(pattern: str) -> tuple[str, list[str]]:
    """The folder that a glob starts from, and the segments after it.

    A folder with a name like `[a]` that exists is taken as this folder and not as a pattern.
    """
    fixed, parts = "", list(Path(pattern).parts)
    while len(parts) > 1 and (not glob.has_magic(parts[0]) or os.path.isdir(os.path.join(fixed, parts[0]))):
        fixed = os.path.join(fixed, parts.pop(0))
    return fixed or ".", parts
