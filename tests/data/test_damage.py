"""Whatever becomes of the files of a cache is said once and made again, and no damaged token is ever read."""

import functools
import os
import pickle
import shutil

import numpy as np
import pytest
from sections import section

from llmjax.data.checksums import BLOCK_BYTES, DamagedError
from llmjax.data.packing import packing
from llmjax.data.pipeline import PackedSequences, make_batches
from llmjax.data.sources.listing import list_sources
from llmjax.data.store import cache
from llmjax.data.store.build import DOCUMENTS, build_store
from llmjax.data.store.encode import encode_batches
from llmjax.data.store.store import Store, open_store
from llmjax.data.tokenizer.tokenizer import ByteTokenizer, load_tokenizer
from llmjax.errors import UserError

BYTES = ByteTokenizer(num_reserved=2)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_bit(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    path.write_bytes(data)


def a_link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


DAMAGES = (cut, emptied, missing, a_folder, a_bit)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache, and what its three things are made of."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        words = rng.choice(["river", "stone", "cloud", "light", "code"], 40 + 900 * (i % 3))
        (folder / "corpus" / f"{i:02d}.txt").write_text(" ".join(words))
    for make in THINGS.values():
        make(folder, lambda text: None)
    return folder


def files(folder):
    return list_sources([str(folder / "corpus")])


def make_tokenizer(folder, report):
    config = section("tokenizer", vocab_size=300)
    tokenizer = cache.cached_tokenizer(folder / "cache", config, files(folder), report=report)
    return tokenizer.fingerprint


def make_store(folder, report):
    store = cache.cached_store(folder / "cache", files(folder), BYTES, report=report)
    return (
        store.header,
        [store.tokens(i).tolist() for i in range(len(store))],
        [store.name(i) for i in range(len(store))],
    )


def make_plan(folder, report):
    lengths = 2 + np.arange(200) * 7919 % 60
    made = packing.cached_plan(lengths, np.arange(200), 64, 0, folder / "cache", report)
    return made.fingerprint, made.num_tokens, [getattr(made, name).tolist() for name in packing.ARRAYS]


THINGS = {"tokenizer": make_tokenizer, "store": make_store, "plan": make_plan}
FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer.model"),
    "store": ("header.json", "checksums.json", "blocks.bin", "tokens_lengths.bin", "tokens_starts.bin", "num_bytes.bin",
              "hashes.bin", "origins.bin", "names_starts.bin", "names_lengths.bin", "names-00000.bin",
              "tokens-00000.bin"),
    "plan": ("plan.json", "checksums.json", "docs.npy", "starts.npy", "lengths.npy", "offsets.npy"),
}  # fmt: skip


def test_every_file_of_a_cache_is_damaged_below(made):
    for thing in THINGS:
        folder = next((made / "cache").glob(f"{thing}-*"))
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES[thing])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("thing, name", [(thing, name) for thing in FILES for name in FILES[thing]])
def test_what_is_damaged_is_said_and_made_again(thing, name, damage, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")  # with times of change, and so with the same keys
    make = functools.partial(THINGS[thing], folder)
    sound, said = make(pytest.fail), []
    damage(next((folder / "cache").glob(f"{thing}-*")) / name)
    assert make(said.append) == sound
    assert len(said) == 1 and "\n" not in said[0] and str(folder / "cache" / thing) in said[0], said
    assert "again" in said[0]
    assert make(pytest.fail) == sound
    assert not list((folder / "cache").glob("*building*"))


@pytest.mark.parametrize(
    "damage", [emptied, missing, a_link_to_itself, lambda path: path.rename(path.with_name("x"))]
)
@pytest.mark.parametrize("thing", THINGS)
def test_a_thing_that_is_no_folder_or_gone_is_made_again(thing, damage, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")
    make = functools.partial(THINGS[thing], folder)
    sound, place = make(pytest.fail), next((folder / "cache").glob(f"{thing}-*"))
    shutil.rmtree(place)
    place.write_text("")
    damage(place)
    said = []
    assert make(said.append) == sound and len(said) == (damage in (emptied, a_link_to_itself))
    assert make(pytest.fail) == sound


def test_every_part_of_a_small_store_counts(tmp_path):
    (tmp_path / "a.txt").write_text("a river, a stone")
    store = build_store(tmp_path / "store", list_sources([str(tmp_path / "a.txt")]), BYTES)
    for path in sorted(store.directory.iterdir()):
        data = path.read_bytes()
        for at in range(0, len(data), len(data) // 25 + 1):
            a_bit(path, at)
            with pytest.raises(DamagedError):
                open_store(store.directory).check_all()
            path.write_bytes(data)
    open_store(store.directory).check_all()


@pytest.fixture
def large(tmp_path):
    """A store of several blocks in several shards, and the files that it is of."""
    (tmp_path / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / "corpus" / f"{i:02d}.txt").write_bytes(rng.integers(97, 123, 20_000, np.uint8).tobytes())
    return list_sources([str(tmp_path / "corpus")]), tmp_path


def test_a_block_is_checked_when_it_is_first_read_and_no_other(large):
    files, folder = large
    build_store(folder / "store", files, BYTES, shard_bytes=210_000)
    sound = [open_store(folder / "store").tokens(i).tolist() for i in range(40)]
    shards = sorted((folder / "store").glob("tokens-*"))
    assert len(shards) == 8 and shards[3].stat().st_size > 3 * BLOCK_BYTES
    a_bit(shards[3], at=BLOCK_BYTES + 5)
    store = pickle.loads(pickle.dumps(open_store(folder / "store")))  # as a worker opens it
    damaged = []
    for i in range(40):
        try:
            assert store.tokens(i).tolist() == sound[i]
        except DamagedError as error:
            assert f"tokens-00003.bin between bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES}" in str(error)
            damaged.append(i)
    assert 1 <= len(damaged) <= 5 and store.tokens(damaged[0], 0, 5).tolist() == sound[damaged[0]][:5]


def test_damage_that_a_run_meets_is_mended_under_it(large):
    files, folder = large
    sound = cache.cached_store(folder / "cache", files, BYTES)
    tokens = [sound.tokens(i).tolist() for i in range(40)]
    for shard in sound.directory.glob("tokens-*"):
        a_bit(shard)
    said = []
    store = cache.cached_store(folder / "cache", files, BYTES, report=said.append)
    assert said == []  # nothing of it was read
    assert [store.tokens(i).tolist() for i in range(40)] == tokens
    assert len(said) == 1 and "is built again from data.sources" in said[0]
    Store(store.directory).check_all()


def test_damage_that_a_run_meets_after_its_sources_changed_is_one_sentence(large):
    files, folder = large
    store = cache.cached_store(folder / "cache", files, BYTES)
    for shard in store.directory.glob("tokens-*"):
        a_bit(shard)
    store = cache.cached_store(folder / "cache", files, BYTES)
    (folder / "corpus" / "07.txt").write_text("another text")
    with pytest.raises(
        ValueError, match="is damaged .* and data.sources changed since the run began"
    ) as error:
        [store.tokens(i) for i in range(40)]
    assert "\n" not in str(error.value)


def test_a_plan_of_an_older_version_is_made_again(tmp_path):
    lengths = np.full(50, 24)
    made = packing.cached_plan(lengths, np.arange(50), 64, 0, tmp_path)
    (tmp_path / f"plan-{made.fingerprint}" / "checksums.json").unlink()
    again = packing.cached_plan(lengths, np.arange(50), 64, 0, tmp_path, lambda text: None)
    assert again.docs.tolist() == made.docs.tolist()


def test_a_tokenizer_that_another_writer_finished_first_stays(made):
    place = next((made / "cache").glob("tokenizer-*"))
    before = place.stat().st_ino
    make_tokenizer(made, pytest.fail)
    assert place.stat().st_ino == before and load_tokenizer(place).vocab_size == 300


@pytest.mark.parametrize("prefetch", [0, 2])
def test_damage_comes_through_the_thread_that_makes_batches_as_what_it_is(prefetch, large):
    files, folder = large
    store = build_store(folder / "store", files, BYTES)
    a_bit(folder / "store" / "tokens-00000.bin")
    source = PackedSequences(store, packing.plan_packing(store.lengths, np.arange(40), 4096, 0), 0)
    with (
        make_batches(source, start=0, batch_size=40, prefetch=prefetch) as batches,
        pytest.raises(DamagedError, match="tokens-00000.bin between bytes"),
    ):
        for _ in range(6):
            next(batches)


def test_a_tokenizing_process_that_dies_is_one_sentence():
    class Deadly(ByteTokenizer):
        def __reduce__(self):
            return os._exit, (9,)

    with pytest.raises(
        UserError, match="data.num_workers: a process that tokenizes ended with code 9"
    ) as error:
        list(encode_batches(Deadly(), DOCUMENTS, [(i, [{"text": "text"}]) for i in range(4)], 2))
    assert "\n" not in str(error.value)
