"""The one writer: whole or not at all, with ordinary permissions, and nothing left beside."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmjax.files import STALE_SECONDS, UNFINISHED, new_folder, write_atomically

ROOT = Path(__file__).parents[1]


def make_folder(folder, text="new", is_whole=lambda folder: False):
    with new_folder(folder, is_whole) as unfinished:
        write_atomically(unfinished / "a.txt", text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


WRITERS = {"file": lambda path: write_atomically(path, "new"), "folder": make_folder}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask_so_that_a_cache_can_be_shared(umask, tmp_path):
    before = os.umask(umask)
    try:
        make_folder(tmp_path / "shared" / "folder")
        write_atomically(tmp_path / "shared" / "file", "new")
    finally:
        os.umask(before)
    for path in (tmp_path / "shared").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failure_names_the_file_and_leaves_nothing(writer, function, number, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fails)
    with pytest.raises(OSError) as error:
        WRITERS[writer](tmp_path / "place")
    assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "place"))
    assert names(tmp_path) == []


def test_a_limit_on_file_sizes_leaves_nothing(tmp_path):
    code = (
        "import errno, pathlib, resource, signal, sys\n"
        "from llmjax.files import new_folder, write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "def folder(path, data):\n"
        "    with new_folder(path, lambda path: False) as new:\n"
        "        (new / 'a').write_bytes(data)\n"
        "for number, write in enumerate((write_atomically, folder)):\n"
        "    try:\n"
        "        write(place / str(number), bytes(5000))\n"
        "    except OSError as error:\n"
        "        assert (error.errno, error.filename) == (errno.EFBIG, str(place / str(number)))\n"
        "    else:\n"
        "        raise AssertionError('no error')\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "[a]*?", "b\udcff", "new\nline"])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_name_that_a_disk_takes_can_be_written(writer, name, tmp_path):
    for _ in range(2):
        WRITERS[writer](tmp_path / name)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a full folder", "a file", "a broken link"])
def test_a_folder_takes_the_place_of_whatever_is_not_whole(there, tmp_path):
    place = tmp_path / "place"
    if "folder" in there:
        place.mkdir()
    if there == "a full folder":
        (place / "old.txt").write_text("old")
    if there == "a file":
        place.write_text("old")
    if there == "a broken link":
        place.symlink_to(tmp_path / "nowhere")
    make_folder(place)
    assert names(tmp_path) == ["place"] and names(place) == ["a.txt"]


def test_a_folder_that_is_whole_by_then_stays(tmp_path):
    make_folder(tmp_path / "place", "first")
    make_folder(tmp_path / "place", "second", is_whole=Path.is_dir)
    assert (tmp_path / "place" / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["place"]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_writer_left_is_deleted_when_it_is_old(writer, tmp_path):
    for age in (0, STALE_SECONDS + 60):
        left = tmp_path / f"place{UNFINISHED}{age}"
        left.mkdir()
        (left / "part").write_text("part")
        for path in (left / "part", left):
            os.utime(path, (time.time() - age,) * 2)
    WRITERS[writer](tmp_path / "place")
    assert names(tmp_path) == ["place", f"place{UNFINISHED}0"]


def test_a_name_that_is_not_unicode_goes_through_json(tmp_path):
    write_atomically(tmp_path / "a.json", json.dumps({"name": "诗\udcff"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "诗\udcff"}
