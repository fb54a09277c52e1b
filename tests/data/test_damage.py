"""Damage to cached files is reported once and repaired, and no damaged token is ever read."""

import functools
import os
import pickle
import shutil

import numpy as np
import pytest
from sections import section

from llmjax.data.checksums import BLOCK_BYTES, DamagedError
from llmjax.data.packing.make_plan import cached_plan, plan_packing
from llmjax.data.packing.plan import ARRAYS
from llmjax.data.pipeline import PackedSequences, make_batches
from llmjax.data.sources.listing import list_sources
from llmjax.data.store import cache
from llmjax.data.store.build import DOCUMENTS, build_store
from llmjax.data.store.encode import encode_batches
from llmjax.data.store.store import Store, open_store
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.errors import UserError

BYTES = ByteTokenizer(num_reserved=2)


# Each function damages one file in another way.


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def deleted(path):
    path.unlink()


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()


def flip_a_bit(path, at=None):
    """Flips a bit of byte `at`, or of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    path.write_bytes(data)


def replaced_by_a_link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


DAMAGES = (truncated, emptied, deleted, replaced_by_a_folder, flip_a_bit)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a corpus and a cache that holds a tokenizer, a store and a plan."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        words = rng.choice(["river", "stone", "cloud", "light", "code"], 40 + 900 * (i % 3))
        (folder / "corpus" / f"{i:02d}.txt").write_text(" ".join(words))
    for make in KINDS.values():
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
    made = cached_plan(lengths, np.arange(200), 64, 0, folder / "cache", report)
    return made.fingerprint, made.num_tokens, [getattr(made, name).tolist() for name in ARRAYS]


# The kinds of cache entries -> a function that makes one and returns its content.
KINDS = {"tokenizer": make_tokenizer, "store": make_store, "plan": make_plan}
# The files of each kind.
FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer.model"),
    "store": ("header.json", "checksums.json", "blocks.bin", "tokens_lengths.bin", "tokens_starts.bin", "num_bytes.bin",
              "hashes.bin", "origins.bin", "names_starts.bin", "names_lengths.bin", "names-00000.bin",
              "tokens-00000.bin"),
    "plan": ("plan.json", "checksums.json", "docs.npy", "starts.npy", "lengths.npy", "offsets.npy"),
}  # fmt: skip


def test_the_tests_below_damage_every_file_of_a_cache(made):
    for kind in KINDS:
        folder = next((made / "cache").glob(f"{kind}-*"))
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES[kind])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind, name", [(kind, name) for kind in FILES for name in FILES[kind]])
def test_a_damaged_file_is_reported_once_and_made_again(kind, name, damage, made, tmp_path):
    # copytree keeps modification times, and therefore the keys of the cache.
    folder = shutil.copytree(made, tmp_path / "copy")
    make = functools.partial(KINDS[kind], folder)
    sound, said = make(pytest.fail), []
    damage(next((folder / "cache").glob(f"{kind}-*")) / name)
    assert make(said.append) == sound
    assert len(said) == 1 and "\n" not in said[0] and str(folder / "cache" / kind) in said[0], said
    assert "again" in said[0]
    assert make(pytest.fail) == sound
    assert not list((folder / "cache").glob("*building*"))


@pytest.mark.parametrize(
    "damage", [emptied, deleted, replaced_by_a_link_to_itself, lambda path: path.rename(path.with_name("x"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_entry_that_is_no_folder_or_missing_is_made_again(kind, damage, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")
    make = functools.partial(KINDS[kind], folder)
    sound, place = make(pytest.fail), next((folder / "cache").glob(f"{kind}-*"))
    shutil.rmtree(place)
    place.write_text("")
    damage(place)
    said = []
    assert make(said.append) == sound and len(said) == (damage in (emptied, replaced_by_a_link_to_itself))
    assert make(pytest.fail) == sound


def test_a_flipped_bit_anywhere_in_a_small_store_is_found(tmp_path):
    (tmp_path / "a.txt").write_text("a river, a stone")
    store = build_store(tmp_path / "store", list_sources([str(tmp_path / "a.txt")]), BYTES)
    for path in sorted(store.directory.iterdir()):
        data = path.read_bytes()
        for at in range(0, len(data), len(data) // 25 + 1):
            flip_a_bit(path, at)
            with pytest.raises(DamagedError):
                open_store(store.directory).check_all()
            path.write_bytes(data)
    open_store(store.directory).check_all()


@pytest.fixture
def large(tmp_path):
    """The files of a corpus that fills several blocks and shards, and the folder of the test."""
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
    flip_a_bit(shards[3], at=BLOCK_BYTES + 5)
    # A worker process opens the store by unpickling it.
    store = pickle.loads(pickle.dumps(open_store(folder / "store")))
    damaged = []
    for i in range(40):
        try:
            assert store.tokens(i).tolist() == sound[i]
        except DamagedError as error:
            assert f"tokens-00003.bin between bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES}" in str(error)
            damaged.append(i)
    assert 1 <= len(damaged) <= 5 and store.tokens(damaged[0], 0, 5).tolist() == sound[damaged[0]][:5]


def test_a_damaged_block_that_a_run_reads_is_repaired_during_the_run(large):
    files, folder = large
    sound = cache.cached_store(folder / "cache", files, BYTES)
    tokens = [sound.tokens(i).tolist() for i in range(40)]
    for shard in sound.directory.glob("tokens-*"):
        flip_a_bit(shard)
    said = []
    store = cache.cached_store(folder / "cache", files, BYTES, report=said.append)
    # The damage is in blocks that were not read yet.
    assert said == []
    assert [store.tokens(i).tolist() for i in range(40)] == tokens
    assert len(said) == 1 and "is built again from data.sources" in said[0]
    Store(store.directory).check_all()


def test_a_damaged_block_is_an_error_of_one_sentence_if_the_sources_changed(large):
    files, folder = large
    store = cache.cached_store(folder / "cache", files, BYTES)
    for shard in store.directory.glob("tokens-*"):
        flip_a_bit(shard)
    store = cache.cached_store(folder / "cache", files, BYTES)
    (folder / "corpus" / "07.txt").write_text("another text")
    with pytest.raises(
        ValueError, match="is damaged .* and data.sources changed since the run began"
    ) as error:
        [store.tokens(i) for i in range(40)]
    assert "\n" not in str(error.value)


def test_a_plan_of_an_older_version_is_made_again(tmp_path):
    lengths = np.full(50, 24)
    made = cached_plan(lengths, np.arange(50), 64, 0, tmp_path)
    (tmp_path / f"plan-{made.fingerprint}" / "checksums.json").unlink()
    again = cached_plan(lengths, np.arange(50), 64, 0, tmp_path, lambda text: None)
    assert again.docs.tolist() == made.docs.tolist()


def test_a_tokenizer_that_another_writer_finished_first_stays(made):
    place = next((made / "cache").glob("tokenizer-*"))
    before = place.stat().st_ino
    make_tokenizer(made, pytest.fail)
    assert place.stat().st_ino == before and load_tokenizer(place).vocab_size == 300


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_thread_that_makes_batches_passes_on_a_damaged_error(prefetch, large):
    files, folder = large
    store = build_store(folder / "store", files, BYTES)
    flip_a_bit(folder / "store" / "tokens-00000.bin")
    source = PackedSequences(store, plan_packing(store.lengths, np.arange(40), 4096, 0), 0)
    with (
        make_batches(source, start=0, batch_size=40, prefetch=prefetch) as batches,
        pytest.raises(DamagedError, match="tokens-00000.bin between bytes"),
    ):
        for _ in range(6):
            next(batches)


def test_a_tokenizing_process_that_dies_is_an_error_of_one_sentence():
    class Deadly(ByteTokenizer):
        def __reduce__(self):
            return os._exit, (9,)

    with pytest.raises(
        UserError, match="data.num_workers: a process that tokenizes ended with code 9"
    ) as error:
        list(encode_batches(Deadly(), DOCUMENTS, [(i, [{"text": "text"}]) for i in range(4)], 2))
    assert "\n" not in str(error.value)
