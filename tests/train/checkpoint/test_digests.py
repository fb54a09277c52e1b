"""Digests of files: what they notice, and what they let pass."""

import json
import random

import pytest

from llmjax.train.checkpoint import digests
from llmjax.train.checkpoint.digests import Damaged


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of several chunks, of one, and of none."""
    monkeypatch.setattr(digests, "CHUNK", 64)
    (tmp_path / "state" / "d").mkdir(parents=True)
    rng = random.Random(0)
    for name, size in (("d/large", 1000), ("small", 5), ("even", 128), ("empty", 0)):
        (tmp_path / "state" / name).write_bytes(rng.randbytes(size))
    digests.write(tmp_path / "state")
    return tmp_path / "state"


def test_what_was_written_passes_whatever_the_chunk_is_by_now(folder, monkeypatch):
    monkeypatch.setattr(digests, "CHUNK", 100)
    digests.check(folder)
    (folder / "foreign").touch()
    digests.check(folder)


def test_every_flipped_bit_is_noticed(folder):
    for name in ("d/large", "small", "even"):
        data = (folder / name).read_bytes()
        for place in range(0, 8 * len(data), 61):
            wrong = bytearray(data)
            wrong[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(wrong)
            digests.check(folder, contents=False)
            with pytest.raises(
                Damaged, match=rf"state/{name} has other contents .* near byte {place // 512 * 64}$"
            ):
                digests.check(folder)
        (folder / name).write_bytes(data)
    digests.check(folder)


def test_every_flipped_bit_of_the_digests_themselves_is_noticed_or_does_no_harm(folder):
    text = (folder / digests.NAME).read_bytes()
    noticed = 0
    for place in range(0, 8 * len(text), 17):
        wrong = bytearray(text)
        wrong[place // 8] ^= 1 << place % 8
        (folder / digests.NAME).write_bytes(wrong)
        try:
            digests.check(folder)
        except Damaged:
            noticed += 1
    assert noticed > 0.9 * len(range(0, 8 * len(text), 17))  # the rest are blanks


def test_another_size_is_noticed_without_reading(folder):
    for name, data in (("small", b"1234"), ("small", b""), ("empty", b"1")):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        with pytest.raises(Damaged, match=rf"state/{name} has \d bytes instead of \d"):
            digests.check(folder, contents=False)
        (folder / name).write_bytes(before)
    (folder / "small").unlink()
    with pytest.raises(Damaged, match="state/small: No such file"):
        digests.check(folder, contents=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"files": {}}', '{"files": [1]}', "\0\1"])
def test_digests_that_are_none_are_noticed(text, folder):
    (folder / digests.NAME).write_text(text)
    with pytest.raises(Damaged, match=r"state/digests.json holds no digests"):
        digests.check(folder)


@pytest.mark.parametrize("key, value", [("algorithm", "md5"), ("chunk", 0), ("chunk", "a"), ("chunk", None)])
def test_digests_of_another_kind_are_not_taken_for_ours(key, value, folder):
    saved = json.loads((folder / digests.NAME).read_text())
    (folder / digests.NAME).write_text(json.dumps(saved | {key: value}))
    with pytest.raises(Damaged, match="holds no digests"):
        digests.check(folder)


def test_parts_are_together_the_whole(folder):
    data = (folder / "d/large").read_bytes()
    for place in range(0, 1000, 64):
        (folder / "d/large").write_bytes(data[:place] + b"?!" + data[place + 2 :])
        found = []
        for part in range(3):
            try:
                digests.check(folder, part=part, parts=3)
            except Damaged:
                found.append(part)
        assert len(found) == 1


def test_the_digest_of_json_is_of_its_meaning():
    assert digests.of_json({"a": 1.5, "b": [1, None]}) == digests.of_json(
        json.loads('{"b":[1,null],  "a":1.50}')
    )
    assert digests.of_json({"a": 1}) != digests.of_json({"a": 2}) != digests.of_json({"b": 2})
