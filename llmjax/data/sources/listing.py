"""Which files data.sources name: files, folders, globs, and this Python's standard library.

Links obey one rule. What is named itself is read, link or not. In a folder that is searched, a link to something inside
that folder is followed, once; a link that leads out of it is followed only where `follow_links` is set. Every file is
read once, however many names lead to it, and what is left out is counted by its reason.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import glob
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llmjax.data.sources.fingerprint import file_digest
from llmjax.data.sources.formats import JSON_SUFFIXES, is_known_suffix, suffix_of
from llmjax.errors import UserError

STDLIB = "stdlib"
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

# Why something in a folder is not read.
UNKNOWN_SUFFIX = "of unknown suffix"
HIDDEN = "hidden"
LEADS_OUT = "links that lead out of the folder"
BROKEN = "links that lead nowhere"
NO_FILE = "neither files nor folders"
NO_FIELD = "JSON without the text field"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the corpus.

    name    relative to the source that the file came from: the same on any machine
    path    where the file lies
    size    bytes on disk
    digest  of the content, see `file_digest`
    origin  which entry of data.sources named the file first, counted from 0
    """

    name: str
    path: str
    size: int
    digest: str
    origin: int = 0


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a corpus, sorted by name, and how many others were left out, by reason."""

    files: tuple[SourceFile, ...]
    left_out: Mapping[str, int]


def list_sources(sources: Sequence[str], *, follow_links: bool = False) -> tuple[SourceFile, ...]:
    """The files of `search_sources`, without a look into JSON files."""
    return search_sources(sources, follow_links=follow_links).files


def search_sources(
    sources: Sequence[str],
    *,
    follow_links: bool = False,
    has_text: Callable[[str], bool] = lambda path: True,
    digest_of: Callable[[str], str] = file_digest,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Listing:
    """The files that the sources name, each once.

    A source is a file (read whatever its suffix), a folder (searched for files with a known suffix, hidden ones left
    out), a glob (`**` too: what it matches is taken as a shell would), or `stdlib`. Raises `UserError` where a source
    does not exist or holds nothing.

    Args:
      sources: the names, in order.
      follow_links: whether links that lead out of a folder that is searched are followed.
      has_text: whether the .json file of a path, found in a folder, has the text field. Many a .json is no corpus.
      digest_of: the digest of the content of the file of a path.
      progress: called as progress(done, total) while files are read for their digests, in bytes.
    """
    if isinstance(sources, str):
        raise UserError(f"data.sources = {sources!r} is one string: give a list of sources.")
    # By its real path: the name, the path, the size and the origin of a file.
    found: dict[str, tuple[str, str, int, int]] = {}
    left_out: collections.Counter[str] = collections.Counter()
    for origin, source in enumerate(sources):
        search = _Search(follow_links, has_text)
        for name, path in search.expand(source):
            real = os.path.realpath(path)
            if real not in found:
                found[real] = name, path, os.stat(path).st_size, origin
        left_out.update(search.left_out)
    if not found:
        raise UserError("data.sources is empty: name files, directories or globs, or stdlib.")
    files, done, total = [], 0, sum(size for _, _, size, _ in found.values())
    for name, path, size, origin in sorted(found.values()):
        progress(done, total)
        files.append(SourceFile(name, path, size, digest_of(path), origin))
        done += size
    return Listing(tuple(files), dict(left_out))


def split_sources(text: str) -> tuple[str, ...]:
    """The names in a text with commas between them. A comma belongs to a name where a file of that name exists."""
    parts, names = text.split(","), []
    while parts:
        joined = (",".join(parts[:count]) for count in range(len(parts), 1, -1))
        name = next((name for name in joined if os.path.lexists(os.path.expanduser(name))), parts[0])
        parts = parts[name.count(",") + 1 :]
        names += [name] if name else []
    return tuple(names)


class _Search:
    """The search for the files of one source; `left_out` counts what is passed over."""

    def __init__(self, follow_links: bool, has_text: Callable[[str], bool]):
        self._follow_links, self._has_text = follow_links, has_text
        self.left_out: collections.Counter[str] = collections.Counter()

    def expand(self, source: str) -> list[tuple[str, str]]:
        """(name, path) of each file that `source` names."""
        if source == STDLIB:
            return _stdlib_files()
        path = os.path.expanduser(source)
        if os.path.isfile(path):
            return [(os.path.basename(path), path)]
        if os.path.isdir(path):
            files = self._corpus_in(path)
            if not files:
                raise UserError(
                    f"data.sources names {source!r}, a directory without text, JSON or .parquet "
                    f"files{self._said()}: name the files themselves if their suffix is unusual."
                )
            return files
        if not glob.has_magic(path):
            raise UserError(f"data.sources names {source!r}, which does not exist: check the path.")
        root, segments = _fixed_part(path)
        files = []
        for match in sorted(self._match(root, segments, os.path.realpath(root))):
            inside = []
            if os.path.isdir(match) and "**" not in segments:
                inside = [found for _, found in self._corpus_in(match)]
            for found in [match] if os.path.isfile(match) else inside:
                files.append((os.path.relpath(found, root).replace(os.sep, "/"), found))
        if not files:
            raise UserError(
                f"data.sources names {source!r}, which matches no file{self._said()}: check the pattern."
            )
        return files

    def _said(self) -> str:
        said = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        advice = "; --config.data.follow_links=true follows links" if LEADS_OUT in self.left_out else ""
        return f" (left out: {said}{advice})" if said else ""

    def _corpus_in(self, root: str) -> list[tuple[str, str]]:
        """The files of a folder that are text by their suffix."""
        kept = []
        for name, path in self._walk(root):
            if not is_known_suffix(name):
                self.left_out[UNKNOWN_SUFFIX] += 1
            elif suffix_of(name) in JSON_SUFFIXES and not self._has_text(path):
                self.left_out[NO_FIELD] += 1
            else:
                kept.append((name, path))
        return kept

    def _walk(self, root: str) -> list[tuple[str, str]]:
        """(name relative to `root`, path) of the files in a folder: first those that lie there, then links to others.

        The order makes a file go by its own name where it has one, and links cannot lead in a circle: each folder
        and each file is visited once.
        """
        top = os.path.realpath(root)
        seen: set[str] = {top}
        found: list[tuple[str, str]] = []
        # Path, real path and name of what is still to be visited.
        folders = collections.deque([(root, top, "")])
        links: collections.deque[tuple[str, str]] = collections.deque()

        def visit(path: str, real: str, name: str, is_folder: bool) -> None:
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
            for entry in sorted(_scan(folder), key=lambda entry: entry.name):
                name = prefix + entry.name
                if entry.name.startswith("."):
                    self.left_out[HIDDEN] += 1
                elif entry.is_symlink():
                    if self._may_follow(entry.path, top):
                        links.append((entry.path, name))
                elif entry.is_dir() or entry.is_file():
                    visit(entry.path, os.path.join(real_folder, entry.name), name, entry.is_dir())
                else:
                    self.left_out[NO_FILE] += 1
        return found

    def _may_follow(self, link: str, top: str) -> bool:
        if not os.path.exists(link):
            self.left_out[BROKEN] += 1
            return False
        real = os.path.realpath(link)
        if self._follow_links or real == top or real.startswith(top.rstrip(os.sep) + os.sep):
            return True
        self.left_out[LEADS_OUT] += 1
        return False

    def _match(self, folder: str, segments: Sequence[str], top: str) -> Iterator[str]:
        """The paths below `folder` that the segments of a glob match."""
        if not segments:
            yield folder
            return
        segment, *rest = segments
        if segment == "**":
            # Zero or more folders, none of them hidden: `_walk` visits each once, so that links end.
            names = [name for name, _ in self._walk(folder)]
            rest = [*rest, "*"] if not rest or rest[-1] == "**" else rest
            for name in names:
                if _matches(name.split("/"), ["**", *rest]):
                    yield os.path.join(folder, *name.split("/"))
            return
        if not glob.has_magic(segment):
            path = os.path.join(folder, segment)
            if os.path.lexists(path) and (not rest or os.path.isdir(path)):
                yield from self._match(path, rest, top)
            return
        for entry in sorted(_scan(folder), key=lambda entry: entry.name):
            if not fnmatch.fnmatchcase(entry.name, segment):
                continue
            if entry.name.startswith(".") and not segment.startswith("."):
                self.left_out[HIDDEN] += 1
            elif (not entry.is_symlink() or self._may_follow(entry.path, top)) and (
                not rest or entry.is_dir()
            ):
                yield from self._match(entry.path, rest, top)


def _matches(parts: Sequence[str], segments: Sequence[str]) -> bool:
    """Whether the parts of a path are what the segments of a glob describe."""
    if not segments:
        return not parts
    segment, *rest = segments
    if segment == "**":
        return any(_matches(parts[skip:], rest) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], segment) and _matches(parts[1:], rest)


def _scan(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"data.sources: the folder {folder!r} cannot be read ({error.strerror}): change its permissions, or name "
            "the files beside it."
        ) from None


def _stdlib_files() -> list[tuple[str, str]]:
    root, found = sysconfig.get_paths()["stdlib"], []
    for folder, _, files in os.walk(root):
        for file in files:
            path = os.path.join(folder, file)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            if _is_stdlib(name) and os.path.isfile(path):
                found.append((name, path))
    return found


def _is_stdlib(name: str) -> bool:
    """Python sources without tests, installed packages, and the build record of this one interpreter."""
    *folders, file = name.split("/")
    return (
        file.endswith(".py")
        and not file.startswith("_sysconfigdata")
        and not any(f in _NOT_STDLIB or f.startswith("config-") for f in folders)
    )


def _fixed_part(pattern: str) -> tuple[str, list[str]]:
    """The folder that a glob starts from, and the segments after it. A folder that exists is no pattern."""
    fixed, parts = "", list(Path(pattern).parts)
    while len(parts) > 1 and (not glob.has_magic(parts[0]) or os.path.isdir(os.path.join(fixed, parts[0]))):
        fixed = os.path.join(fixed, parts.pop(0))
    return fixed or ".", parts
