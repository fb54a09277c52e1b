"""Damaged checkpoints of every kind: never read, never deleted, never in the way of a good one."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest
from test_checkpoint import abstract, assert_same, make_state

from llmjax.errors import UserError
from llmjax.train.checkpoint import digests
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.checkpoint.config import CheckpointConfig


def check_meta(meta):
    if not isinstance(meta.get("cursor"), int):
        raise ValueError(f"cursor={meta.get('cursor')!r} is not a whole number")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of updates 1, 2 and 3. Not to be written to."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, CheckpointConfig(keep=3)) as checkpoints:
        for update in (1, 2, 3):
            checkpoints.save(update, make_state(update), {"cursor": update}, rank=float(update))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def arrays(path):
    """The largest file of arrays."""
    return max((path / "state").glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


def flip(file, place=0.5):
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 4
    file.write_bytes(data)


def change_meta(path, change):
    file = path / "meta" / "metadata"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))


def replace_by_a_file(path):
    shutil.rmtree(path)
    path.write_text("x")


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def without_digests(path):
    """As an older version left it."""
    change_meta(path, lambda meta: meta.pop("digest"))
    (path / "state" / "digests.json").unlink()


def old_without_arrays(path):
    without_digests(path)
    for name in ("d", "ocdbt.process_0/d"):
        shutil.rmtree(path / "state" / name)


def old_with_empty_manifest(path):
    without_digests(path)
    (path / "state" / "manifest.ocdbt").write_bytes(b"")


def never_put_together(path):
    """Whole by its digests, but they are of what the processes wrote, each for itself."""
    state = path / "state"
    (state / "manifest.ocdbt").unlink()
    shutil.rmtree(state / "d")
    digests.write(state)


def old_with_names_cut(path):
    without_digests(path)
    os.truncate(path / "state" / "_METADATA", 100)


def old_with_another_cursor(path):
    without_digests(path)
    change_meta(path, lambda meta: meta.update(cursor="a"))


DAMAGE = {
    "it is empty": empty,
    "it is a file": replace_by_a_file,
    "no meta": lambda path: shutil.rmtree(path / "meta"),
    "no file of meta": lambda path: (path / "meta" / "metadata").unlink(),
    "empty meta": lambda path: (path / "meta" / "metadata").write_bytes(b""),
    "cut meta": lambda path: (path / "meta" / "metadata").write_text('{"cursor": 3'),
    "meta of bytes": lambda path: (path / "meta" / "metadata").write_bytes(b"\xff\xfe\0\1"),
    "meta is a list": lambda path: (path / "meta" / "metadata").write_text("[1]"),
    "meta is a folder": lambda path: ((path / "meta" / "metadata").unlink(), (path / "meta" / "metadata").mkdir()),
    "another cursor": lambda path: change_meta(path, lambda meta: meta.update(cursor=4)),
    "no cursor": lambda path: change_meta(path, lambda meta: meta.pop("cursor")),
    "no digest": lambda path: change_meta(path, lambda meta: meta.pop("digest")),
    "a loss of text": lambda path: change_meta(path, lambda meta: meta.update(rank="low")),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "state is a file": lambda path: replace_by_a_file(path / "state"),
    "no digests": lambda path: (path / "state" / "digests.json").unlink(),
    "cut digests": lambda path: (path / "state" / "digests.json").write_text('{"files'),
    "no arrays": lambda path: arrays(path).unlink(),
    "empty arrays": lambda path: arrays(path).write_bytes(b""),
    "cut arrays": lambda path: os.truncate(arrays(path), arrays(path).stat().st_size // 2),
    "a flipped bit in arrays": lambda path: flip(arrays(path)),
    "a flipped bit in a manifest": lambda path: flip(path / "state" / "manifest.ocdbt"),
    "a flipped bit in names": lambda path: flip(path / "state" / "_METADATA"),
    "a flipped bit in shardings": lambda path: flip(path / "state" / "_sharding"),
    "parts that were never put together": never_put_together,
    "an older one without arrays": old_without_arrays,
    "an older one with an empty manifest": old_with_empty_manifest,
    "an older one with names cut": old_with_names_cut,
    "an older one with another cursor": old_with_another_cursor,
}  # fmt: skip


# orbax leaves reads that still fail in another thread, when the first has failed, and Python complains of them.
KINDS = [
    pytest.param(kind, marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
    if kind == "an older one without arrays"
    else kind
    for kind in DAMAGE
]


def contents(path):
    """Every file under `path`."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_newest_good_one_is_used_and_the_damaged_one_set_aside(kind, folder):
    DAMAGE[kind](folder / "3")
    before, told = contents(folder / "3"), []
    options = {"check_meta": check_meta, "tell": told.append}
    with Checkpoints(folder, CheckpointConfig(keep=3), **options) as checkpoints:
        state, meta = checkpoints.restore(abstract(make_state()))
        assert_same(state, make_state(2))
        assert meta == {"cursor": 2, "rank": 2.0}
        sentence = next(text for text in told if "set aside as damaged-3" in text)
        assert f"the checkpoint of update 3 in {folder} is damaged (" in sentence and "\n" not in sentence
        assert checkpoints.updates() == [1, 2] and checkpoints.latest() == 2
        assert contents(folder / "damaged-3") == before
        assert checkpoints.save(3, make_state(3), {"cursor": 3})  # trained again
    told.clear()
    with Checkpoints(folder, CheckpointConfig(keep=3), **options) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))
    assert told == [] and sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "damaged-3"]


@pytest.mark.parametrize("kind", KINDS)
def test_who_only_reads_uses_the_newest_good_one_says_so_and_moves_nothing(kind, folder):
    DAMAGE[kind](folder / "3")
    before, told = contents(folder), []
    with Checkpoints(folder, read_only=True, check_meta=check_meta, tell=told.append) as checkpoints:
        params, meta = checkpoints.restore_params(abstract(make_state().params))
        assert_same(params, make_state(2).params)
        assert meta["cursor"] == 2
        assert any(f"the checkpoint of update 3 in {folder} is damaged (" in text for text in told)
        with pytest.raises(UserError, match=r"update 3 in .* is damaged \(.*\); choose 1, 2"):
            checkpoints.restore_params(abstract(make_state().params), 3)
    assert contents(folder) == before


def test_an_older_damaged_one_stands_in_nobodys_way(folder, capsys):
    empty(folder / "1")
    flip(arrays(folder / "2"))
    with Checkpoints(folder, CheckpointConfig(keep=3)) as checkpoints:
        assert checkpoints.updates() == [2, 3]  # what is in arrays is found out when they are read
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))
    assert capsys.readouterr().err.count("damaged-1") == 1
    with Checkpoints(folder, CheckpointConfig(keep=3)) as checkpoints:
        with pytest.raises(
            UserError, match=r"update 2 .* has other contents than were written near byte 0\); choose"
        ):
            checkpoints.restore(abstract(make_state()), 2)
        assert checkpoints.verify() == 3


def test_none_is_deleted_before_a_good_one_is_known(folder):
    """Although fewer are to be kept from now on: the newest turns out to be damaged."""
    flip(arrays(folder / "3"))
    with Checkpoints(
        folder, CheckpointConfig(keep=1, keep_best=False), tell=lambda text: None
    ) as checkpoints:
        checkpoints.wait()
        assert checkpoints.updates() == [1, 2, 3]
        assert checkpoints.restore(abstract(make_state()))[1]["cursor"] == 2
        assert checkpoints.updates() == [1, 2]
    assert {path.name for path in folder.iterdir()} == {"2", "damaged-3"}


def test_what_is_noted_as_saved_follows_what_is_given_up(tmp_path):
    noted = []
    options = {"on_saved": lambda update, meta: noted.append(update)}
    with Checkpoints(tmp_path, CheckpointConfig(keep=3), **options) as checkpoints:
        checkpoints.save(1, make_state(1), {"finite_loss": True})
        checkpoints.save(2, make_state(2), {})
        checkpoints.give_up_after(1)
        assert noted == [1, 2, 1]
        checkpoints.amend(1, finite_loss=None)
        checkpoints.give_up_after(None)
    assert noted == [1, 2, 1, None]


def test_with_no_good_one_left_nothing_begins(folder):
    for update, kind in ((1, "it is empty"), (2, "a flipped bit in arrays"), (3, "cut arrays")):
        DAMAGE[kind](folder / str(update))
    told = []
    for read_only in (True, False, False):
        with (
            Checkpoints(folder, read_only=read_only, tell=told.append) as checkpoints,
            pytest.raises(
                UserError, match=r"no checkpoint in .* is good: .* are damaged; restore one from a copy"
            ),
        ):
            checkpoints.restore(abstract(make_state()))
        assert len(told) == {True: 3, False: 6}[read_only]
    assert sorted(path.name for path in folder.iterdir()) == ["damaged-1", "damaged-2", "damaged-3"]


def test_every_flipped_bit_is_noticed_before_arrays_are_used(folder):
    """Over all files that are read: bits at even distances."""
    files = [file for file in (folder / "3").rglob("*") if file.is_file() and file.parent != folder / "3"]
    silent = []
    with Checkpoints(folder, read_only=True, check_meta=check_meta, tell=lambda text: None) as checkpoints:
        for file in files:
            data = file.read_bytes()
            for place in range(5, 8 * len(data), max(8 * len(data) // 12, 1)):
                wrong = bytearray(data)
                wrong[place // 8] ^= 1 << place % 8
                file.write_bytes(wrong)
                if not checkpoints._damage(3):
                    silent.append(file)
            file.write_bytes(data)
        # orbax writes this one last, and nothing of ours reads it.
        assert {file.name for file in silent} <= {"commit_success.txt"}
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))


def test_one_without_digests_is_read_with_a_word(folder):
    without_digests(folder / "3")
    told = []
    with Checkpoints(folder, tell=told.append) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))
    assert (
        len(told) == 1 and "update 3" in told[0] and "has no digests (an older version wrote it)" in told[0]
    )


def test_another_model_is_no_damage(folder):
    with Checkpoints(folder, tell=lambda text: pytest.fail(text)) as checkpoints:
        with pytest.raises(UserError, match="use the model and optimizer config it was trained with"):
            checkpoints.restore(abstract(make_state(dtype=jnp.bfloat16)))
        assert checkpoints.updates() == [1, 2, 3]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
def test_what_a_disk_refuses_to_give_counts_as_damaged(error, folder, monkeypatch):
    refused, original = arrays(folder / "3"), type(folder).open

    def open_but(path, *args, **kwargs):
        if path.name == refused.name:
            raise error
        return original(path, *args, **kwargs)

    monkeypatch.setattr(type(folder), "open", open_but)
    told = []
    with Checkpoints(folder, tell=told.append) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(2))
    assert error.strerror in told[0] and "set aside as damaged-3" in told[0]


def test_what_cannot_be_renamed_is_said(folder, monkeypatch):
    def rename(path, to):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "rename", rename)
    empty(folder / "3")
    with pytest.raises(
        UserError, match=r"is damaged and cannot be renamed to damaged-3 \(Permission denied\)"
    ):
        Checkpoints(folder)


def test_foreign_names_do_no_harm(folder):
    for name in ("notes.txt", "007", "-1", "4.bak", "four"):
        (folder / name).mkdir()
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(folder, CheckpointConfig(keep=3), tell=lambda text: pytest.fail(text)) as checkpoints:
        assert checkpoints.updates() == [1, 2, 3]
    assert {"notes.txt", "007", "-1", "4.bak", "four"} <= {path.name for path in folder.iterdir()}


def test_a_reader_survives_a_trainer_that_deletes_what_it_reads(folder):
    with Checkpoints(folder, read_only=True, tell=lambda text: pytest.fail(text)) as checkpoints:
        shutil.rmtree(folder / "3")
        shutil.copytree(folder / "2", folder / "9")
        params, _ = checkpoints.restore_params(abstract(make_state().params))
        assert_same(params, make_state(2).params)
        with pytest.raises(UserError, match=r"there is no checkpoint of update 3 .* choose among 1, 2, 9"):
            checkpoints.restore_params(abstract(make_state().params), 3)


def test_a_save_is_complete_with_its_digests_or_has_no_name(tmp_path, monkeypatch):
    """Where a process dies within the digests there is no checkpoint, and one that is noted has them."""
    seen = []

    def on_saved(update, meta):
        unfinished = next(tmp_path.glob("1.orbax-checkpoint-tmp*"))
        seen.append((update, meta, len([*unfinished.rglob("digests.json")]), (tmp_path / "1").exists()))

    with Checkpoints(tmp_path, on_saved=on_saved) as checkpoints:
        checkpoints.save(1, make_state(1), {"cursor": 1})
    assert seen == [(1, {"cursor": 1, "rank": None}, 1, False)]

    def die(folder):
        raise OSError("disk full")

    monkeypatch.setattr("llmjax.train.checkpoint.orbax_files.digests.write", die)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, make_state(2), {"cursor": 2})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.updates() == [1]


def test_nothing_is_saved_once_another_run_has_taken_over(tmp_path):
    def taken_over():
        raise UserError("held by another")

    with Checkpoints(tmp_path, before_save=taken_over) as checkpoints:
        with pytest.raises(UserError, match="held by another"):
            checkpoints.save(1, make_state(1), {})
        assert checkpoints.updates() == []
