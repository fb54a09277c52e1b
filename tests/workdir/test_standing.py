"""Where a workdir stands: nothing that was saved and is gone is mistaken for a run that has still to begin."""

import json
import shutil

import pytest
import tiny_run

from llmjax import flags, main
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.errors import UserError
from llmjax.train.checkpoint import shelf
from llmjax.train.loop.run_position import NEWER, PartialUpdateRecord, Position
from llmjax.workdir import standing
from llmjax.workdir.contents import write_json
from llmjax.workdir.lock import Lock

CONFIG = {"checkpoint": {"every": 20}, "train": {"tokens_per_update": 512}}


def save(workdir, folder, number, **changes):
    """A checkpoint without arrays."""
    path = workdir / folder / str(number)
    (path / "meta").mkdir(parents=True)
    (path / "state").mkdir()
    meta = Position(update=number).to_meta() | {"config": CONFIG, "data_fingerprint": "a"} | changes
    (path / "meta" / "metadata").write_text(json.dumps(shelf.with_digest(meta)))
    standing.note_saved(workdir, folder)(number, meta)


def record(workdir, updates, **fields):
    lines = [
        {"kind": "train", "update": n, "loss": 1.0, "tokens": 512 * n, **fields}
        for n in range(1, updates + 1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def workdir(tmp_path):
    """Of a run that was killed at update 50, after checkpoints of 20 and 40."""
    write_json(tmp_path / "config.json", CONFIG)
    record(tmp_path, 50)
    for update in (20, 40):
        save(tmp_path, "checkpoints", update)
    return tmp_path


def older(workdir):
    (workdir / "saved.json").unlink()


def emptied(workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").mkdir()


def set_aside(workdir):
    for update in (20, 40):
        shelf.move_aside(workdir / "checkpoints", update)


def set_aside_of_an_older_version(workdir):
    set_aside(workdir)
    older(workdir)
    record(workdir, 3)


def gone_of_an_older_version_at_its_end(workdir):
    older(workdir)
    emptied(workdir)
    record(workdir, 3)
    write_json(workdir / "summary.json", {})


def gone_of_an_older_version(workdir):
    older(workdir)
    shutil.rmtree(workdir / "checkpoints")


def gone_with_a_torn_note(workdir):
    emptied(workdir)
    (workdir / "saved.json").write_text('{"fol')


GONE = {
    "the folder is gone": lambda workdir: shutil.rmtree(workdir / "checkpoints"),
    "the folder is empty": emptied,
    "the metrics are gone as well": lambda workdir: (emptied(workdir), (workdir / "metrics.jsonl").unlink()),
    "the config is gone as well": lambda workdir: (emptied(workdir), (workdir / "config.json").unlink()),
    "all are damaged": set_aside,
    "all are damaged, an older version": set_aside_of_an_older_version,
    "gone, an older version": gone_of_an_older_version,
    "gone, an older version that had ended": gone_of_an_older_version_at_its_end,
    "gone, with a torn note": gone_with_a_torn_note,
}


@pytest.mark.parametrize("kind", GONE)
def test_what_was_saved_and_is_gone_is_refused(kind, workdir):
    GONE[kind](workdir)
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError) as error:
        standing.check_standing(workdir, pytest.fail)
    sentence = str(error.value)
    assert sentence.startswith(f"--workdir={workdir} holds no checkpoint, although ") and "\n" not in sentence
    assert f"mount or restore {workdir / 'checkpoints'}, or use another --workdir" in sentence
    assert sorted(workdir.rglob("*")) == before


def cut_short(workdir):
    """Killed between noting the first save and its last step."""
    emptied(workdir)
    standing.note_saved(workdir, "checkpoints")(20, {"update": 20})
    (workdir / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()


def before_the_first(workdir):
    older(workdir)
    emptied(workdir)
    record(workdir, 19)


def all_were_skipped(workdir):
    older(workdir)
    emptied(workdir)
    record(workdir, 50, skipped=1)


def given_up(workdir):
    emptied(workdir)
    standing.note_saved(workdir, "checkpoints")(None, {})


FRESH = {
    "nothing is there": lambda workdir: (
        [path.unlink() for path in workdir.glob("*.js*")] and emptied(workdir)
    ),
    "killed before its first checkpoint": before_the_first,
    "killed within its first checkpoint": cut_short,
    "no update was ever applied": all_were_skipped,
    "every checkpoint was given up": given_up,
}


@pytest.mark.parametrize("kind", FRESH)
def test_a_run_without_anything_to_lose_begins_again(kind, workdir):
    FRESH[kind](workdir)
    standing.check_standing(workdir, pytest.fail)
    assert not standing.has_begun(workdir)


def test_a_run_goes_on_where_only_the_last_save_is_gone_and_says_so(workdir):
    standing.check_standing(workdir, pytest.fail)
    told = []
    shutil.rmtree(workdir / "checkpoints" / "40")
    standing.check_standing(workdir, told.append)
    save(workdir, "partial_update", 333)
    shutil.rmtree(workdir / "partial_update")
    standing.check_standing(workdir, told.append)
    assert ["checkpoints/40" in told[0], "partial_update/333" in told[1], len(told)] == [True, True, 2]
    assert all("not there any more; going on from the newest that is" in text for text in told)


@pytest.mark.parametrize("folder, number", [("checkpoints", 60), ("partial_update", 333)])
def test_a_run_killed_before_a_noted_save_got_its_name_goes_on_without_a_word(folder, number, workdir):
    """However often it is killed: the first to go on removes what has no name, and the next must not miss it."""
    standing.note_saved(workdir, folder)(number, {"update": number})
    unnamed = workdir / folder / f"{number}.orbax-checkpoint-tmp"
    unnamed.mkdir(parents=True)
    standing.check_standing(workdir, pytest.fail)
    standing.forget_unnamed_save(workdir)
    shutil.rmtree(unnamed)
    standing.check_standing(workdir, pytest.fail)
    told = []
    shutil.rmtree(workdir / "checkpoints" / "40")
    standing.check_standing(workdir, told.append)
    assert "checkpoints/40" in told[0]


def test_a_first_save_that_never_got_its_name_is_forgotten(workdir):
    cut_short(workdir)
    standing.forget_unnamed_save(workdir)
    emptied(workdir)
    standing.check_standing(workdir, pytest.fail)


def test_a_stopped_update_alone_is_enough_to_go_on_from(workdir):
    save(workdir, "partial_update", 333)
    shutil.rmtree(workdir / "checkpoints")
    standing.check_standing(workdir, pytest.fail)
    assert standing.partial_folders(workdir) == ["partial_update"]


def test_removing_a_stopped_update_keeps_what_was_set_aside(workdir):
    for number in (333, 444):
        save(workdir, "partial_update", number)
    standing.remove_partial_update(workdir)
    assert not (workdir / "partial_update").exists()
    for number in (333, 444):
        save(workdir, "partial_update", number)
    shelf.move_aside(workdir / "partial_update", 333)
    standing.remove_partial_update(workdir)
    assert [path.name for path in (workdir / "partial_update").iterdir()] == ["damaged-333"]
    assert not standing.partial_folders(workdir)


def test_a_config_that_is_gone_is_taken_from_the_newest_readable_checkpoint(workdir):
    assert standing.config_of(workdir, pytest.fail) == CONFIG
    (workdir / "config.json").unlink()
    save(workdir, "checkpoints", 60, config={"other": {}})
    (workdir / "checkpoints" / "60" / "meta" / "metadata").write_text("{")
    told = []
    assert standing.config_of(workdir, told.append) == CONFIG
    assert len(told) == 1 and "config.json is gone; the config in checkpoints/40 is used" in told[0]
    for update in (20, 40):
        shutil.rmtree(workdir / "checkpoints" / str(update))
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        standing.config_of(workdir, pytest.fail)
    emptied(workdir)
    assert standing.config_of(workdir, pytest.fail) is None


def test_metrics_that_lack_updates_are_said(workdir):
    standing.check_metrics(workdir, 40, pytest.fail)
    standing.check_metrics(workdir, 0, pytest.fail)
    told = []
    record(workdir, 30)
    standing.check_metrics(workdir, 40, told.append)
    (workdir / "metrics.jsonl").unlink()
    standing.check_metrics(workdir, 40, told.append)
    assert "ends at update 30, but the run goes on after update 40" in told[0] and "is gone, but" in told[1]


META = Position(update=3, cursor=24, tokens=96).to_meta() | {"config": {}, "data_fingerprint": "a"}
MAY_BE_NONE = ("evaluation", "histories", "partial_update", *NEWER)
WRONG = {
    **{f"no {name}": {name: None} for name in META if name not in MAY_BE_NONE},
    "update of text": {"update": "3"}, "cursor below 0": {"cursor": -1}, "tokens not whole": {"tokens": 1.5},
    "update true": {"update": True}, "seconds of text": {"seconds": "1"}, "evaluation of a number": {"evaluation": 1.0},
    "one history": {"histories": [1]}, "histories of numbers": {"histories": [1, 2]},
    "histories without keys": {"histories": [{}, {}]}, "a partial update of a number": {"partial_update": 5},
    "a partial update without steps": {"partial_update": {"metrics": []}}, "config of a list": {"config": []},
    "fingerprint of a number": {"data_fingerprint": 5},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_meta_with_missing_or_wrong_values_is_named(kind):
    standing.check_meta(META)
    key, value = next(iter(WRONG[kind].items()))
    meta = (
        {name: each for name, each in META.items() if name != key} if value is None else META | {key: value}
    )
    with pytest.raises(ValueError, match=key):
        standing.check_meta(meta)


def test_a_checkpoint_of_an_older_version_owes_nothing():
    assert not Position.from_meta({name: value for name, value in META.items() if name != "owes"}).owes


def test_a_checkpoint_of_an_older_version_has_its_partial_update_under_another_name():
    partial = PartialUpdateRecord(4, 2, ({"loss": 1.0},))
    meta = json.loads(json.dumps(Position(update=3, partial_update=partial).to_meta()))
    old = {name: value for name, value in meta.items() if name != "partial_update"}
    assert Position.from_meta(old | {"window": meta["partial_update"]}).partial_update == partial
    assert Position.from_meta(old | {"window": None}).partial_update is None
    with pytest.raises(ValueError, match="partial_update is missing"):
        Position.from_meta(old)


def test_a_stopped_update_of_an_older_version_is_found_and_removed(workdir):
    save(workdir, "window", 333)
    assert standing.partial_folders(workdir) == ["window"] and standing.has_begun(workdir)
    save(workdir, "partial_update", 444)
    assert standing.partial_folders(workdir) == ["partial_update", "window"]
    standing.remove_partial_update(workdir)
    assert not (workdir / "window").exists() and not (workdir / "partial_update").exists()


def test_what_processes_compare_tells_different_disks_apart(workdir, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(workdir, other)

    def seen(at, folders=True):
        return [*standing.describe(at, folders=folders).values()]

    assert seen(workdir) == seen(other) and "20, 40" in seen(workdir)
    save(other, "checkpoints", 60)
    assert seen(workdir) != seen(other) and seen(workdir, folders=False) == seen(other, folders=False)
    write_json(other / "config.json", {})
    assert seen(workdir, folders=False) != seen(other, folders=False)
    assert (
        standing.digest_of({"a": 1, "b": 2}) == standing.digest_of({"b": 2, "a": 1}) != standing.digest_of({})
    )


def test_a_run_asks_for_its_workdir_before_it_judges_what_lies_there(tmp_path, capsys):
    """The run that has it may be about to give a checkpoint its name."""
    tiny_run.write_corpus(tmp_path / "corpus")
    words = tiny_run.command(tmp_path, f"--workdir={tmp_path / 'run'}")
    save(tmp_path / "run", "checkpoints", 20)
    save(tmp_path / "run", "checkpoints", 40)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    config, _ = resolve_config(read_config(flags.parse(words)[1]), 8)
    write_json(tmp_path / "run" / "config.json", config.to_dict())
    with Lock(tmp_path / "run"):
        assert main.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is in use" in err
