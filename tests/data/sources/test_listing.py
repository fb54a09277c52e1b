"""What is found and what is left out: links, loops, folders that cannot be read, names with commas and brackets."""

import os
from pathlib import Path

import pytest

from llmjax.data.sources import fingerprint, listing
from llmjax.data.sources.fingerprint import REMEMBERED_BYTES, Digests, corpus_fingerprint, file_digest
from llmjax.data.sources.listing import list_sources, search_sources, split_sources
from llmjax.data.sources.records import has_text
from llmjax.errors import UserError


def names(*sources, **options):
    return [file.name for file in search_sources([str(s) for s in sources], **options).files]


@pytest.fixture
def linked(tmp_path):
    """A folder with every kind of link: within it, out of it, to itself, and to nothing."""
    root, outside = tmp_path / "corpus", tmp_path / "outside"
    for folder in (root / "deep", root / ".hidden", outside / "more"):
        folder.mkdir(parents=True)
    for path in (
        root / "a.txt",
        root / "deep/b.txt",
        root / ".hidden/c.txt",
        outside / "d.txt",
        outside / "more/e.txt",
    ):
        path.write_text(path.name)
    (root / "alias.txt").symlink_to(root / "a.txt")
    (root / "kept.txt").symlink_to(".hidden/c.txt")
    (root / "again").symlink_to("deep")
    (root / "self").symlink_to(".")
    (root / "deep/up").symlink_to("..")
    (root / "out.txt").symlink_to(outside / "d.txt")
    (root / "far").symlink_to(outside / "more")
    (root / "nowhere.txt").symlink_to("absent")
    return root


SEARCHES = {"folder": ("",), "every level": ("**", "*.txt"), "every level, all": ("**",), "one level": ("*",)}


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_follows_links_within_the_folder_once_and_no_others_unless_asked(search, linked):
    source = linked.joinpath(*SEARCHES[search])
    inside, outside = ["a.txt", "deep/b.txt", "kept.txt"], ["far/e.txt", "out.txt"]
    found = {os.path.realpath(file.path) for file in list_sources([str(source)])}
    assert found == {os.path.realpath(linked / name) for name in inside}
    found = {os.path.realpath(file.path) for file in list_sources([str(source)], follow_links=True)}
    assert found == {os.path.realpath(linked / name) for name in (*inside, *outside)}


def test_a_file_goes_by_its_own_name_where_it_has_one(linked):
    assert names(linked) == ["a.txt", "deep/b.txt", "kept.txt"]
    assert names(linked, follow_links=True) == ["a.txt", "deep/b.txt", "far/e.txt", "kept.txt", "out.txt"]


def test_what_is_left_out_is_counted_by_reason(linked):
    (linked / "picture.png").write_bytes(b"x")
    os.mkfifo(linked / "pipe.txt")
    assert search_sources([str(linked)]).left_out == {
        listing.UNKNOWN_SUFFIX: 1, listing.HIDDEN: 1, listing.LEADS_OUT: 2, listing.BROKEN: 1, listing.NO_FILE: 1,
    }  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES)
def test_what_is_left_out_is_counted_once_whatever_leads_to_it(search, linked):
    source = str(linked.joinpath(*SEARCHES[search]))
    once = search_sources([source]).left_out
    assert once[listing.HIDDEN] == once[listing.BROKEN] == 1
    assert search_sources([source, source, str(linked)]).left_out == once
    (linked / "notes.xyz").write_text("x")
    assert search_sources([source, str(linked / "notes.xyz")]).left_out == once


def test_a_source_that_is_a_link_itself_is_read(linked, tmp_path):
    (tmp_path / "file.txt").symlink_to(linked / "a.txt")
    (tmp_path / "folder").symlink_to(linked)
    assert names(tmp_path / "file.txt") == ["file.txt"]
    assert names(tmp_path / "folder") == ["a.txt", "deep/b.txt", "kept.txt"]


def test_a_folder_of_links_that_lead_out_says_how_to_follow_them(linked, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/x.txt").symlink_to(linked / "a.txt")
    for source in (tmp_path / "links", tmp_path / "links" / "*.txt", tmp_path / "links" / "**"):
        with pytest.raises(UserError, match=r"1 links that lead out.*--config\.data\.follow_links=true"):
            list_sources([str(source)])


@pytest.mark.parametrize("search", ["folder", "every level", "one level"])
def test_a_folder_that_cannot_be_read_is_a_sentence(search, linked, monkeypatch):
    real = os.scandir

    def refuse(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        UserError, match=r"the folder .*deep' cannot be read \(Permission denied\): change its perm"
    ):
        list_sources([str(linked.joinpath(*SEARCHES[search]))])


@pytest.mark.parametrize("digest_of", [file_digest, lambda path: Digests(Path(path + ".json")).of(path)])
@pytest.mark.parametrize("source", ["", "**", "a.txt"])
def test_a_file_that_cannot_be_read_is_a_sentence(source, digest_of, linked, monkeypatch):
    def refuse(path, *mode, **options):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(
        UserError, match=r"data.sources: the file .*a\.txt' cannot be read \(Permission denied\)"
    ):
        search_sources([str(linked / source)], digest_of=digest_of)


def test_json_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[]")
    real = open

    def refuse(path, *mode, **options):
        if os.path.basename(path) == "a.json":
            raise PermissionError(13, "Permission denied", path)
        return real(path, *mode, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"the file .*a\.json' cannot be read \(Permission denied\)"):
        search_sources([str(tmp_path)], has_text=has_text)


def test_a_source_that_is_no_file_is_told_why(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("nowhere")
    for name, reason in {
        "pipe": "is neither a file nor a folder",
        "loop": r"cannot be read \(.*\)",
        "lost": "is a link that leads nowhere",
        "absent": "does not exist",
        "absent\0": "does not exist",
        "a" * 300: r"cannot be read \(File name too long\)",
    }.items():
        with pytest.raises(UserError, match=rf"data\.sources names .*, which {reason}: "):
            list_sources([str(tmp_path / name)])
    monkeypatch.setattr(os.path, "isfile", lambda path: False)
    monkeypatch.setattr(
        os, "stat", lambda path, **o: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(UserError, match=r"which cannot be read \(Permission denied\): check .* permissions"):
        list_sources([str(tmp_path / "locked" / "a.txt")])


def test_globs_match_as_a_shell_does(tmp_path):
    for name in ("a/x.txt", "a/b/x.txt", "a/b/c/x.txt", "a/.h/x.txt", "y.txt", "a/b/y.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern, expected in {
        "**/x.txt": ["a/b/c/x.txt", "a/b/x.txt", "a/x.txt"],
        "a/**/x.txt": ["b/c/x.txt", "b/x.txt", "x.txt"],
        "*/*/x.txt": ["a/b/x.txt"],
        "a/b/[xy].*": ["x.txt", "y.md"],
        "**/b/**/x.txt": ["a/b/c/x.txt", "a/b/x.txt"],
        "a/.h/*": ["x.txt"],
        "?.txt": ["y.txt"],
        "**/**/y.txt": ["y.txt"],
    }.items():
        assert names(tmp_path / pattern) == expected, pattern


def test_names_with_brackets_commas_and_bytes_that_are_no_unicode_are_found(tmp_path):
    folder = tmp_path / "data [v1], part*"
    folder.mkdir()
    odd = ("a[1].txt", "b,c.txt", "(1,2).txt", os.fsdecode(b"caf\xe9.txt"))
    for name in odd:
        (folder / name).write_text("x")
    assert names(folder) == sorted(odd) == names(folder / "*.txt") == names(folder / "**" / "*")
    assert sorted(name for part in odd for name in names(folder / part)) == sorted(odd)
    corpus_fingerprint(list_sources([str(folder)]))


def test_commas_divide_names_unless_a_file_has_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c.txt", "d,e,f"):
        (tmp_path / name).write_text("x")
    assert split_sources("a,b.txt") == ("a,b.txt",)
    assert split_sources("c.txt,a,b.txt,d,e,f,*.md,") == ("c.txt", "a,b.txt", "d,e,f", "*.md")
    assert split_sources("a,e") == ("a", "e")


def test_another_text_of_the_same_size_and_time_is_another_corpus(tmp_path):
    path = tmp_path / "a.txt"
    seen = set()
    for text in ("one text", "two text"):
        path.write_text(text)
        os.utime(path, ns=(0, 0))
        seen.add(corpus_fingerprint(list_sources([str(path)])))
    assert len(seen) == 2


@pytest.mark.parametrize("size", [0, 1, REMEMBERED_BYTES, REMEMBERED_BYTES + 12345])
def test_an_edit_anywhere_is_noticed_though_size_and_time_stay(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(size))
    os.utime(path, ns=(0, 0))
    seen = {Digests(tmp_path / "digests.json").of(str(path))}
    for at in {0, 4321, size // 2 + 99_999, size - 1} if size > 1 else range(size):
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"x")
        os.utime(path, ns=(0, 0))
        digests = Digests(tmp_path / "digests.json")
        digest = digests.of(str(path))
        digests.save()
        assert digest not in seen and digest == file_digest(str(path))
        seen.add(digest)


def test_a_large_file_is_read_once_while_it_stays_as_it_is(tmp_path, monkeypatch):
    path, memory = str(tmp_path / "a.txt"), tmp_path / "cache" / "digests.json"
    Path(path).write_bytes(bytes(REMEMBERED_BYTES))
    read = []
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: read.append(path) or file_digest(path))

    def digest():
        digests = Digests(memory)
        found = digests.of(path)
        digests.save()
        return found

    before = digest()
    # It was written a moment ago, so that another edit might have the same time.
    assert not memory.exists() and digest() == before and len(read) == 2
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", -1.0)
    assert digest() == digest() == before and len(read) == 3
    memory.write_text("{damaged")
    assert digest() == digest() == before and len(read) == 4
    with open(path, "r+b") as file:
        file.write(b"x")
    assert digest() == digest() != before and len(read) == 5
